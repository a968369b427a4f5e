"""Saving and loading of checkpoints and model files."""
