"""Gradients through emitted segments."""
