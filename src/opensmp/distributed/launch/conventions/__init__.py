"""The conventions of launchers: which variables each sets for the processes that it starts."""
