"""Completes a step's graph: late gradients, and side effects of user code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Op, Tensor
from opensmp.execution.autodiff.segment_gradients import LateGradient
from opensmp.execution.emission.task_graph import live_operations


def compute_late_gradients(
    all_late: Sequence[LateGradient], results: list[Tensor], roots: Callable[[], list[Op]]
) -> list[Op]:
    """Replaces placeholders of late gradients with live consumers; returns the live operations.

    Placeholders in `results` are replaced in the list itself. `roots` gives the operations that the
    step needs.
    """
    waiting = list(all_late)
    computed: dict[int, Tensor] = {}
    while True:
        live = live_operations(roots())
        alive = set(live)
        used = [g for g in waiting if any(p.op in alive for _, p in g.placeholders)]
        if not used:
            done = [g for g in all_late if g not in waiting]
            assert not any(p.op in alive for g in done for _, p in g.placeholders)
            return live
        for late in used:
            waiting.remove(late)
            for placeholder, gradient in late.compute(computed):
                computed[id(placeholder)] = gradient
                for consumer in placeholder.consumers():
                    for index, tensor in enumerate(consumer.inputs):
                        if tensor is placeholder:
                            _private.replace_input(consumer, index, gradient)
                results[:] = [gradient if t is placeholder else t for t in results]


def side_effects_of(graph: Any) -> list[Op]:
    """Stateful operations of user code, which TensorFlow runs even if nothing reads them."""
    return [
        op
        for op in graph.get_operations()
        if _private.is_stateful(op) and op.type not in ("ReadVariableOp", "Placeholder")
    ]


def without_bridge(gradient: Any, instead: Mapping[int, Tensor]) -> Any:
    """Replaces the tensors of a gradient by those in `instead`, which bypass bridge operations."""
    if isinstance(gradient, tf.IndexedSlices):
        values, indices = (
            without_bridge(gradient.values, instead),
            without_bridge(gradient.indices, instead),
        )
        shape = gradient.dense_shape
        return tf.IndexedSlices(
            values, indices, None if shape is None else without_bridge(shape, instead)
        )
    return instead.get(id(gradient), gradient)


def in_place(tensor: Tensor) -> Tensor:
    """Copies a tensor on its own device, which orders the copy after the current control inputs."""
    with tf.device(tensor.device):
        return tf.identity(tensor)


def read_zero(done: Tensor, device: str) -> Op:
    """Reads the zero returned by a call with side effects, so that the call is not pruned."""
    with tf.device(device):
        return tf.raw_ops.Assert(condition=tf.equal(done, 0), data=[done])
