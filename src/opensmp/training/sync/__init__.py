"""Checks that all processes train on the same data, with the same settings."""
