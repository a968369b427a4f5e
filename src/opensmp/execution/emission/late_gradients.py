"""The end of a step's graph: late gradients, effects of the user's own code, results in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.execution.autodiff.segment_gradients import LateGradient
from opensmp.execution.emission.task_graph import live_operations

Op = Any
Tensor = Any


def compute_late_gradients(
    all_late: Sequence[LateGradient], results: list[Tensor], roots: Callable[[], list[Op]]
) -> list[Op]:
    """Replaces the placeholders of late gradients that something reads.

    Args:
        all_late: The late gradients of a step.
        results: What the step returns; placeholders in it are replaced in place.
        roots: Gives the operations that the step needs.

    Returns:
        The live operations.
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
    """Operations of the user's own code that TensorFlow runs though nothing reads them."""
    return [
        op
        for op in graph.get_operations()
        if _private.is_stateful(op) and op.type not in ("ReadVariableOp", "Placeholder")
    ]


def without_bridge(gradient: Any, instead: Mapping[int, Tensor]) -> Any:
    """A gradient without the bridges that it went over."""
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
    """An identity on the tensor's own device."""
    with tf.device(tensor.device):
        return tf.identity(tensor)
