"""Models of the program: their state, registry, hooks and intercepted calls."""
