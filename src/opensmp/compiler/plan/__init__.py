"""Planning: assigns each operation to a partition."""
