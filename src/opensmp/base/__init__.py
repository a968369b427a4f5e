"""What every room may use, with the standard library only."""
