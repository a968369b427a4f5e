"""Ways to make a plan: manually, automatically by costs, or from another plan."""
