"""Where the variables of models are placed."""
