"""Saving and loading of whole models and weights."""
