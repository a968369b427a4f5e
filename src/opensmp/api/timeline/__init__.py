"""`smp.record_timeline`: what a step did, measured."""
