"""Training that goes on where an earlier program stopped."""
