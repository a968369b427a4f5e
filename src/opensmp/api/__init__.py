"""The public API: the names that `opensmp` exports."""
