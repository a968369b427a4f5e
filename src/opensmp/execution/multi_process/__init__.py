"""One step run by several processes: placement, sends and receives."""
