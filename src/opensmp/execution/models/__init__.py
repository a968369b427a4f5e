"""The models of the program, and how their calls are taken."""
