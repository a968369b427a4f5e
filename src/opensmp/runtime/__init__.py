"""What happens when a pipeline runs: processes, devices, and emitted calls.

The effects live here; everything that only computes values is in the packages beside it.
"""
