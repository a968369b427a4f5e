"""Decorators for functions that create models or datasets."""
