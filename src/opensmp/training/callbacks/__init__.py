"""Keras callbacks with several processes."""
