"""Wrappers of private APIs of TensorFlow's automatic differentiation."""
