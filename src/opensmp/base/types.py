"""Objects of TensorFlow and Keras in annotations: neither has types that mypy could check."""

from __future__ import annotations

import os
from typing import Any

Tensor = Any
"""A tensor of a graph, or an eager one: `tf.Tensor`."""

Op = Any
"""An operation of a graph: `tf.Operation`."""

Gradient = Any
"""The gradient of a variable: a tensor, `tf.IndexedSlices`, or None where there is none."""

Variable = Any
"""A variable of Keras or of TensorFlow."""

ConcreteFunction = Any
"""A traced function: `tf.types.experimental.ConcreteFunction`."""

Layer = Any
"""A `keras.Layer`."""

Model = Any
"""A `keras.Model`."""

PathLike = str | os.PathLike[str]
"""The path of a file or directory."""
