"""`opensmp simulate`."""
