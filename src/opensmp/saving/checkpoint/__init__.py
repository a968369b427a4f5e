"""Checkpoints of models, optimizers and other trackable objects."""
