"""Checkpoints and files of models: between memory and disk."""
