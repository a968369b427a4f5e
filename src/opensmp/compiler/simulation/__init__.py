"""What a step would take on a cluster that nobody here has, and the fastest way to run it."""
