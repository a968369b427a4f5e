"""Detects failures, deadlocks, stalls and exits, so that no process waits forever."""
