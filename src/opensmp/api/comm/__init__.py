"""Collective and point-to-point communication of tensors and Python objects."""
