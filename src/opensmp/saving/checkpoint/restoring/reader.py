"""Reads the metadata and values of a checkpoint."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator, Sequence

import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Tensor
from opensmp.errors import CheckpointError
from opensmp.saving.checkpoint import shards
from opensmp.saving.checkpoint.contents import OBJECT_GRAPH
from opensmp.saving.checkpoint.directory.names import is_pattern
from opensmp.saving.checkpoint.restoring.object_matching import Stored
from opensmp.saving.collective_errors import DamagedError


class Files:
    """A checkpoint in files.

    Attributes:
        path: The path for TensorFlow's readers, valid while this object lives. They treat
            characters such as `[` as a glob pattern: then the path goes through an open descriptor
            of the directory.

    Raises:
        tf.errors.OpError: It cannot be read.
        DamagedError: It is damaged.
        CheckpointError: It has no object graph, as in TensorFlow 1, or TensorFlow cannot read a
            file of this name.
    """

    def __init__(self, prefix: str) -> None:
        self.path = self._readable(prefix)
        with _reading():
            # load_checkpoint would interpret a directory of this name as a checkpoint directory.
            reader = tf.compat.v1.train.NewCheckpointReader(self.path)
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
        with _reading():
            self.object_graph = bytes(reader.get_tensor(OBJECT_GRAPH))
            nodes = _private.checkpoint_nodes(self.object_graph)
        numbers = {number for node in nodes for number in node.children.values()}
        if not nodes or not numbers <= set(range(len(nodes))):
            raise DamagedError("The graph of its objects is damaged: it has others than it names.")

    def read(self, keys: Sequence[str], threads: int) -> dict[str, Tensor]:
        """Reads values into host memory, by key, with at most `threads` threads."""
        values = [self.stored[key] for key in keys]
        tensors = shards.read_tensors(
            self.path,
            keys,
            [value.dtype for value in values],
            [self._bytes(value) for value in values],
            threads,
        )
        return dict(zip(keys, tensors, strict=True))

    def check(self, keys: Sequence[str]) -> None:
        """Reads and discards values, to verify their checksums."""
        for key in keys:
            self.read([key], threads=1)

    def _readable(self, prefix: str) -> str:
        if not is_pattern(prefix):
            return prefix
        directory, name = os.path.split(prefix)
        if is_pattern(name):
            raise CheckpointError(
                f"TensorFlow takes {name!r} for a pattern of names, and cannot read a checkpoint "
                "whose name has any of []*?\\. Expected: another name; its files may be renamed."
            )
        number = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        weakref.finalize(self, os.close, number)
        return f"/proc/self/fd/{number}/{name}"

    def _bytes(self, value: Stored) -> int:
        size = max(1, value.dtype.size or 1)
        for length in value.shape:
            size *= length
        return size


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Converts Python errors of TensorFlow's reader, such as `IndexError`, to `DamagedError`."""
    try:
        yield
    except (tf.errors.OpError, MemoryError, OSError):
        raise
    except Exception as error:
        raise DamagedError(f"It cannot be read: {type(error).__name__}: {error}") from error
