"""Serialization of plans as JSON files."""
