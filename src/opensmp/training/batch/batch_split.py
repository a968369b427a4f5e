"""Splits a batch into replicas' shares and microbatches, and joins their results."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import tensorflow as tf

from opensmp.base.types import Tensor
from opensmp.distributed.collectives.reduce import all_reduce
from opensmp.distributed.world import DP_GROUP, World
from opensmp.errors import StepError


class Part(NamedTuple):
    """One microbatch: rows `begin` to `begin + size` of the batch.

    Attributes:
        begin: The first row.
        size: Number of rows, at least 1.
        counted: Number of rows that contribute to results: all of them, or 0 in a replica without
            rows of its own, which runs another replica's row only to take part.
    """

    begin: int
    size: int
    counted: int


class NotByRows(StepError):
    """An input or output of a model does not have one entry per example of the batch."""


@dataclass(frozen=True)
class Split:
    """How a batch is divided.

    Attributes:
        rows: Rows of the whole batch, over all replicas.
        parts: The microbatches of this replica.
        replicas: The ranks that hold the same partitions, one per replica.
    """

    rows: int
    parts: tuple[Part, ...]
    replicas: tuple[int, ...] = (0,)

    @classmethod
    def of(cls, rows: int, world: World) -> Split:
        """Divides a batch among the replicas, and each share into microbatches.

        The sizes of shares differ by at most one row, and so do those of microbatches. A share with
        fewer rows than the number of microbatches has one microbatch per row.
        """
        if rows < 1:
            raise StepError("A batch without rows was received. Expected: at least one example.")
        replicas = world.group(DP_GROUP)
        first, last = _share(rows, world.rank_in(DP_GROUP), len(replicas))
        number = min(world.config.microbatches, last - first)
        if not number:
            return cls(rows, (Part(0, 1, 0),), replicas)
        cuts = [first + (last - first) * k // number for k in range(number + 1)]
        parts = [Part(a, b - a, b - a) for a, b in itertools.pairwise(cuts)]
        return cls(rows, tuple(parts), replicas)

    @property
    def is_even(self) -> bool:
        """Whether all replicas have the same number of rows."""
        return self.rows % len(self.replicas) == 0

    @property
    def fractions(self) -> tuple[float, ...]:
        """The fraction of the whole batch in each microbatch."""
        return tuple(part.counted / self.rows for part in self.parts)

    def take(self, nest: Any) -> list[Any]:
        """One nest per microbatch of this replica; scalars are passed to each unchanged."""
        parts = self.parts
        if len(parts) == 1 and parts[0].size == self.rows:
            return [nest]
        return [
            tf.nest.map_structure(functools.partial(self.rows_of, part), nest) for part in parts
        ]

    def rows_of(self, part: Part, leaf: Any) -> Any:
        """The rows of a tensor in one microbatch; returns scalars and other objects unchanged."""
        if not tf.is_tensor(leaf) or leaf.shape.rank == 0:
            return leaf
        if leaf.shape.rank is None or leaf.shape[0] not in (self.rows, None):
            raise NotByRows(
                f"A batch of {self.rows} examples cannot be split into microbatches: it has a "
                f"tensor of shape {leaf.shape}. Expected: {self.rows} entries along the first "
                "axis of each tensor, or a scalar. Put what belongs to no example into the model, "
                'or use {"microbatches": 1} in smp.init.'
            )
        begin, size = part.begin, part.size
        if isinstance(leaf, tf.SparseTensor):
            starts = [begin] + [0] * (leaf.shape.rank - 1)
            sizes = tf.concat([[size], leaf.dense_shape[1:]], 0)
            taken = tf.sparse.slice(leaf, starts, sizes)
            if not leaf.shape[1:].is_fully_defined():
                return taken
            # Slicing loses the static shape, which layers need to be built.
            return tf.SparseTensor(taken.indices, taken.values, [size, *leaf.shape[1:]])
        return leaf[begin : begin + size]

    def concat(self, values: Sequence[Tensor], what: str) -> Tensor:
        """Concatenates the rows of this replica's microbatches; `what` describes them in errors."""
        for part, value in zip(self.parts, values, strict=True):
            shape = value.shape
            if shape.rank is None or not shape.rank or shape[0] not in (part.size, None):
                if len(self.parts) == 1 and len(self.replicas) == 1:
                    return value
                raise NotByRows(
                    f"{what} has the shape {shape} for a microbatch of {part.size} examples, so "
                    "that it cannot be put together again. Expected: one entry for each example "
                    "along the first axis. Return such tensors from an smp.step function, or use "
                    '{"microbatches": 1} in smp.init.'
                )
        return values[0] if len(values) == 1 else tf.concat(list(values), 0)

    def has_rows(self, loss: Tensor, part: Part, model: str) -> bool:
        """Whether a loss that a layer added for a microbatch has one entry per example."""
        if len(self.parts) == 1 and len(self.replicas) == 1:
            return False  # the only part: the loss is that of the batch in either case
        shape = loss.shape
        if shape.rank is None or (shape.rank and shape[0] is None):
            raise StepError(
                f"A layer of model '{model}' adds a loss of the shape {shape} for a microbatch of "
                f"{part.size} examples: whether it is a number or has an entry for each example "
                "decides how those of the microbatches make up that of the batch. Expected: a "
                "known shape. Add tf.reduce_mean(loss) or tf.reduce_sum(loss), or call "
                "loss.set_shape before add_loss."
            )
        return bool(shape.rank) and shape[0] == part.size

    def mean(self, values: Sequence[Tensor]) -> Tensor:
        """The sum of the microbatches' values, each weighted by its fraction of the batch."""
        if len(values) == 1 and self.fractions == (1.0,):
            return values[0]
        return tf.add_n(
            [
                value * tf.constant(fraction, value.dtype)
                for value, fraction in zip(values, self.fractions, strict=True)
            ]
        )

    def sum(self, own: Tensor) -> Tensor:
        """All-reduces a tensor over the replicas by summation."""
        return all_reduce([own], self.replicas, name="a loss of all replicas")[0]

    def gather(self, own: Tensor, what: str) -> Tensor:
        """Gathers the rows of all replicas; `what` describes them in errors."""
        if len(self.replicas) == 1:
            return own
        if not isinstance(own, tf.Tensor) or own.dtype == tf.string or own.shape.rank is None:
            raise StepError(
                f"{what}, {own!r}, cannot be collected from several replicas of the model. "
                "Expected: dense tensors of numbers with a known number of dimensions."
            )
        counted = sum(part.counted for part in self.parts)
        begin = self.parts[0].begin if counted else 0
        paddings = [[begin, self.rows - begin - counted]] + [[0, 0]] * (own.shape.rank - 1)
        number = tf.cast(own, tf.int32) if own.dtype == tf.bool else own
        # Zero padding, because the replicas may have different numbers of rows.
        padded = tf.pad(number[:counted], paddings)
        (total,) = all_reduce([padded], self.replicas, name="the outputs of all replicas")
        total.set_shape([self.rows, *own.shape[1:]])
        return tf.cast(total, own.dtype)


def _share(rows: int, replica: int, replicas: int) -> tuple[int, int]:
    return rows * replica // replicas, rows * (replica + 1) // replicas


def num_rows(nest: Any) -> int | None:
    """Number of examples in a batch: the length of its first non-scalar tensor; None if unknown."""
    for leaf in tf.nest.flatten(nest):
        shape = getattr(leaf, "shape", None)
        if shape is None:
            continue
        shape = tuple(shape)  # of an array, a tensor, or a composite tensor
        if shape:
            return None if shape[0] is None else int(shape[0])
    return None
