"""`smp.record_timeline`: measured timelines of steps."""
