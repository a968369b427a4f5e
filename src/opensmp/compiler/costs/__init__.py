"""Costs: FLOPs and bytes of the operations of a traced graph."""
