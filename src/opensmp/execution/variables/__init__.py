"""Placement of model variables."""
