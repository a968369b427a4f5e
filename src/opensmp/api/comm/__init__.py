"""Tensors and objects of several ranks."""
