"""Whole models and their weights in files."""
