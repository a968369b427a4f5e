"""Collective operations on tensors and Python objects."""
