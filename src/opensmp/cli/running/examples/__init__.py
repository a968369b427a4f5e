"""Example programs, which come with the package."""
