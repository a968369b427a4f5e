"""Makes sure that all processes train on the same, with the same settings."""
