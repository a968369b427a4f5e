"""What `compile`, `fit`, `evaluate` and `predict` of a split model need.

- trainer.py: the methods that a DistributedModel adds to Keras' trainer
- functions.py: one compiled function per batch size, called with data
- microbatches.py: which rows go to which replica and microbatch, and back together
- whole.py: a call of the model with a whole batch, with its gradient
- separate.py: loss and gradients microbatch by microbatch, where they add up
- weighting.py: whether they do
- accumulate.py: sums of gradients
- modes.py: what a call of the model means while `fit` runs
- meeting.py: where several processes meet, and make sure that they do the same
- fingerprint.py: what tells one batch from another
- callbacks.py: which callbacks run where, and what all processes agree on
- leading.py: a callback in one process, with the help of the others
"""
