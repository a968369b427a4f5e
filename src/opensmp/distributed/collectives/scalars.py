"""Scalar tensors of changing numbers, without a memory leak.

TensorFlow caches a tensor, about 700 bytes, for each Python number that is converted outside a
function, for the life of the process: with a step counter that is a leak. It does not cache NumPy
arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from opensmp.base.types import Tensor


def scalar(number: Any, dtype: Any) -> Tensor:
    """A scalar tensor of a number that changes all the time, such as a step counter."""
    return tf.constant(np.array(number, tf.as_dtype(dtype).as_numpy_dtype))
