"""How `opensmp run` starts, shows and ends ranks."""
