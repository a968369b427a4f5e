"""What users see: the names that `opensmp` hands out."""
