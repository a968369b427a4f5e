"""The directory in which checkpoints lie."""
