"""Recomputation of activations: what the backward pass computes again instead of keeping it."""
