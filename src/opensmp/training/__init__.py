"""What `compile`, `fit`, `evaluate` and `predict` of a split model need."""
