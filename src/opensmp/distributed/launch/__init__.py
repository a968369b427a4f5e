"""How processes are started and find each other."""
