"""The file formats of models: how each is recognised, written and read."""
