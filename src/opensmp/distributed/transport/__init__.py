"""Point-to-point transfers of tensors inside a graph."""
