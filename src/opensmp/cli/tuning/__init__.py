"""Finds the best settings of a run by measuring a few training steps of each."""
