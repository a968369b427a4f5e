"""Emitted segments as differentiable functions."""
