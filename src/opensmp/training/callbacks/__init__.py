"""Callbacks in several processes."""
