"""Pipelines of equal stages as arrays: schedules of any size, without an object for each action."""
