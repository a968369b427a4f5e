"""Lowering: turns a planned graph into forward and backward functions per segment."""
