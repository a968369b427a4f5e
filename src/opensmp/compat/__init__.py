"""Compatibility with Horovod and Keras 2 for existing scripts."""
