"""Helpers that depend on the standard library only; every other package may import them."""
