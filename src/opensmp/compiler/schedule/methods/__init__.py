"""The schedules, one module each, with a function of the module's name that builds it."""
