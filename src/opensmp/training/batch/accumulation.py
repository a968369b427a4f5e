"""Sums gradients over microbatches on the devices of their variables, and over replicas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from opensmp.base.types import Gradient, Tensor
from opensmp.compiler.lowering.sparse_gradients import SameRows, sum_of_slices
from opensmp.compiler.trace.structure import Structure
from opensmp.compiler.trace.variables import tf_variable
from opensmp.distributed.collectives.sparse import slices_of_all
from opensmp.execution.emission.pipeline import Pipeline
from opensmp.execution.multi_process.gradient_reduction import reduce_gradients
from opensmp.execution.multi_process.remote_gradient import is_elsewhere, pack
from opensmp.training.batch.batch_split import Split

_NAME = "the gradients of all replicas"


class Accumulator:
    """Accumulates the gradients of variables."""

    def __init__(self, variables: Sequence[Any]) -> None:
        self._variables = list(variables)
        self._found: list[list[Gradient]] = [[] for _ in variables]

    def add(self, gradients: Sequence[Gradient | None]) -> None:
        """Adds one gradient per variable; None adds nothing."""
        for found, gradient in zip(self._found, gradients, strict=True):
            if gradient is not None:
                found.append(gradient)

    def _sums(self, pipeline: Pipeline, others: Sequence[Tensor]) -> list[Gradient | None]:
        """The sum for each variable; None if no gradient was added."""
        fewer = pipeline.terms(self._found, others)
        return [
            _sum(terms or found, tf_variable(variable).device) if found else None
            for variable, found, terms in zip(self._variables, self._found, fewer, strict=True)
        ]

    def finish(self, pipeline: Pipeline, others: Any) -> tuple[list[Gradient | None], Any]:
        """Completes the pipeline; returns the sums, and `others`.

        Sums of variables of other processes are `RemoteGradient`s.
        """
        rest = Structure.of(others)
        sums = [Structure.of(gradient) for gradient in self._sums(pipeline, rest.tensors)]
        flat = [tensor for each in (*sums, rest) for tensor in each.tensors]
        finished = iter(pipeline.finish(flat))
        gradients = []
        for each in sums:
            gradients.append(pack(each, [next(finished) for _ in each.tensors]))
        return gradients, rest.pack(list(finished))


def sum_over_replicas(gradients: Sequence[Gradient | None], split: Split) -> list[Gradient | None]:
    """Sums gradients over the replicas of the model, each of which has the gradient of its rows.

    A gradient is None or without rows if another process owns its variable.
    """
    if len(split.replicas) == 1:
        return list(gradients)
    sparse = [
        isinstance(g, tf.IndexedSlices) and not isinstance(g, SameRows) and not is_elsewhere(g)
        for g in gradients
    ]
    others = [None if s else g for g, s in zip(gradients, sparse, strict=True)]
    sums = reduce_gradients(others, "sum", split.replicas)
    return [
        slices_of_all(gradient, split.replicas, name=_NAME, is_even=split.is_even)
        if is_sparse
        else sum_
        for gradient, is_sparse, sum_ in zip(gradients, sparse, sums, strict=True)
    ]


def _sum(gradients: list[Gradient], device: str) -> Gradient:
    if len(gradients) == 1:
        return gradients[0]
    with tf.device(device or None):
        if all(isinstance(gradient, tf.IndexedSlices) for gradient in gradients):
            return sum_of_slices(gradients)
        return tf.add_n([tf.convert_to_tensor(gradient) for gradient in gradients])
