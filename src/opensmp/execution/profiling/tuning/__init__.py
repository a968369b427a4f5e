"""What `opensmp tune` and `smp.tune` have in common: candidates, and measured steps."""
