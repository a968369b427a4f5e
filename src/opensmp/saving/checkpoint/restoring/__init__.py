"""Restores checkpoints."""
