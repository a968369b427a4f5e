"""Authenticated control connections between the processes of a run."""
