"""Emission: turns a schedule into the calls of one step's graph.

All graph side effects happen here; the compiler package only computes values.
"""
