"""Cost model of operations: FLOPs, bytes and residuals of a traced graph."""
