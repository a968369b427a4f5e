"""Cuts a graph of units into partitions."""
