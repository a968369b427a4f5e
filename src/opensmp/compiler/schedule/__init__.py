"""Schedules: the order in which every device runs the actions of a step, as plain data.

A `TaskGraph` defines the actions, their devices and their dependencies. The functions in `methods`
order them; `validate` checks any order, `simulate` measures it, and `grid` draws it.
The package does not depend on TensorFlow.
"""
