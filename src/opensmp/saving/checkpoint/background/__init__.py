"""Checkpoints written in the background while training continues."""
