"""Failures, deadlocks, stalls and exits: no process waits for ever."""
