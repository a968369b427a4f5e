"""The checkpoint directory: files, state file, manifests and lock."""
