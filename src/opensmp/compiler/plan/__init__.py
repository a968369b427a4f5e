"""Plan: which operation runs in which partition."""
