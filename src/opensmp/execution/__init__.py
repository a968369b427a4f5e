"""Emit: from a schedule to the calls of one step's graph.

The effects live here; everything that only computes values is in the compiler.
"""
