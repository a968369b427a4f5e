"""Schedules: in which order every device runs the actions of a step, as pure data.

A `TaskGraph` says what there is to do, where, and what depends on what. `simple`,
`interleaved` and `zero_bubble` order it; `validate` checks any order, `simulate` measures it,
`grid` draws it. Nothing here knows TensorFlow.
"""
