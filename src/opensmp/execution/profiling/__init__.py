"""Measures times on the available devices."""
