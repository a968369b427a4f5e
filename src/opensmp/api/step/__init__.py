"""`smp.step`."""
