"""Wrappers of private TensorFlow APIs."""
