"""Checkpoints: values of models, optimizers and whatever else, between memory and files."""
