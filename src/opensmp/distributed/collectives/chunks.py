"""Large tensors travel in chunks, several at once, which fills a connection better."""

from __future__ import annotations

from typing import Any

CHUNK_BYTES = 4 << 20
"""The most that travels as one piece."""


def chunk_sizes(spec: Any) -> list[int]:
    """Numbers of elements of the chunks of a tensor.

    Args:
        spec: The tensor or its `tf.TensorSpec`; the shape is known.

    Example:
        >>> chunk_sizes(tf.TensorSpec([3, 1 << 20], tf.float32))
        [1048576, 1048576, 1048576]
    """
    size = int(spec.shape.num_elements())
    count = max(1, -(-size * spec.dtype.size // CHUNK_BYTES))
    each = max(1, -(-size // count))
    return [min(each, size - start) for start in range(0, size, each)] or [0]
