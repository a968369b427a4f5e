"""Implementation of `compile`, `fit`, `evaluate` and `predict` of a partitioned model."""
