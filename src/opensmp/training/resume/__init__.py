"""Resumes training where an earlier program stopped."""
