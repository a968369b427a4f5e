"""Processing of one batch: split into microbatches, model call, loss and gradients."""
