"""Decorators for functions that make a model or its data."""
