"""Splits large tensors into chunks that are sent concurrently, to use the full bandwidth."""

from __future__ import annotations

from typing import Any

CHUNK_BYTES = 4 << 20
"""Maximum size of a chunk."""


def chunk_sizes(spec: Any) -> list[int]:
    """Numbers of elements of the chunks of a tensor."""
    size = int(spec.shape.num_elements())
    count = max(1, -(-size * spec.dtype.size // CHUNK_BYTES))
    each = max(1, -(-size // count))
    return [min(each, size - start) for start in range(0, size, each)] or [0]
