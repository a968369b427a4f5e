"""Wrappers of private Keras APIs."""
