"""The calls of a step, on their devices, in the order of the schedule."""
