"""Reads what a checkpoint says about itself, and values of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from opensmp.errors import CheckpointError
from opensmp.saving import parts
from opensmp.saving.contents import OBJECT_GRAPH
from opensmp.saving.matching import Stored

Tensor = Any


class Files:
    """A checkpoint in files.

    Args:
        prefix: Its path, without endings.

    Raises:
        tf.errors.OpError: It cannot be read.
        CheckpointError: It has names of variables instead of objects, as TensorFlow 1 wrote them.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        reader = tf.train.load_checkpoint(prefix)
        shapes, dtypes = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
        self.stored = {
            key: Stored(tuple(shape), tf.as_dtype(dtypes[key])) for key, shape in shapes.items()
        }
        if OBJECT_GRAPH not in self.stored:
            raise CheckpointError(
                f"The checkpoint {prefix} has no object graph: expected one that was written by "
                "smp.CheckpointManager or tf.train.Checkpoint, received one of tf.compat.v1, or "
                "other files. Its tensors: " + ", ".join(sorted(self.stored)[:5])
            )
        self.object_graph = bytes(reader.get_tensor(OBJECT_GRAPH))

    def read(self, keys: Sequence[str], threads: int) -> dict[str, Tensor]:
        """Values by key, in host memory.

        Args:
            keys: Keys of the values.
            threads: How many threads may be used.

        Raises:
            tf.errors.OpError: They cannot be read, or a checksum in the files is wrong.
        """
        values = [self.stored[key] for key in keys]
        tensors = parts.read_tensors(
            self.prefix,
            keys,
            [value.dtype for value in values],
            [self._bytes(value) for value in values],
            threads,
        )
        return dict(zip(keys, tensors, strict=True))

    def check(self, keys: Sequence[str]) -> None:
        """Reads values to compare checksums, and forgets them.

        Raises:
            tf.errors.OpError: They cannot be read, or a checksum in the files is wrong.
        """
        for key in keys:
            self.read([key], threads=1)

    def _bytes(self, value: Stored) -> int:
        size = max(1, value.dtype.size or 1)
        for length in value.shape:
            size *= length
        return size
