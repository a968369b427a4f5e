"""Validates untrusted model files before anything is created from them."""
