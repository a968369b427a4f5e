"""Checkpoints: values of models, optimizers and whatever else."""
