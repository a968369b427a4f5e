"""A batch: its split into microbatches, its call, its loss and gradients."""
