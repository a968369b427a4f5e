"""Lower: from a planned graph to forward and backward functions per segment."""
