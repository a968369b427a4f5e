"""Runs one step in several processes: placement, sends and receives."""
