"""The ways to a plan: by hand, by costs, or from another plan."""
