"""Scalar tensors of numbers that change, without a trace left behind.

TensorFlow keeps a tensor of each Python number that is ever turned into one outside of a function,
some 700 bytes, for the life of the process: with the number of a step that is a leak. It keeps
none of NumPy's arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

Tensor = Any


def scalar(number: Any, dtype: Any) -> Tensor:
    """A scalar tensor of a number that will not come again, such as that of a step.

    Args:
        number: A number of Python's or NumPy's.
        dtype: Its TensorFlow type.

    Example:
        ```python
        scalar(7, tf.int64)  # as tf.constant(7, tf.int64)
        ```
    """
    return tf.constant(np.array(number, tf.as_dtype(dtype).as_numpy_dtype))
