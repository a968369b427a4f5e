"""Emits a step's calls on their devices, in schedule order."""
