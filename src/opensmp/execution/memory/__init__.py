"""Memory of a step: what it computes again, and where it puts what it does not need."""
