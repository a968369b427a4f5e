"""`smp.DistributedModel`."""
