"""What existing scripts expect and current libraries have dropped."""
