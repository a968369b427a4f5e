"""Coarsening: groups the operations of a traced graph into a small number of units."""
