"""FLOP statistics of operations from TensorFlow's profiler."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import ops
from tensorflow.python.profiler.internal import flops_registry  # noqa: F401, fills a registry
from tensorflow.python.util import deprecation

from opensmp.base.types import Op


class _Shapes:
    """Stub graph through which TensorFlow's op statistics look up shapes by tensor name."""

    def __init__(self, shapes: Callable[[str], Sequence[int]]) -> None:
        self._shapes = shapes

    def get_tensor_by_name(self, name: str) -> Any:
        shape = tf.TensorShape(self._shapes(name))
        return types.SimpleNamespace(get_shape=lambda: shape)


def registered_flops(op: Op, inputs: Sequence[Any], outputs: Sequence[Any]) -> float | None:
    """FLOPs of an operation according to TensorFlow's profiler.

    The statistics have no public name, and read shapes from a graph, where some may be unknown.
    """
    try:
        statistics = ops._stats_registry.lookup(f"{op.type},flops")
    except LookupError:
        return None
    shapes = {t.name: shape for t, shape in zip(op.inputs, inputs, strict=True)}
    shapes.update({t.name: shape for t, shape in zip(op.outputs, outputs, strict=True)})
    try:
        with deprecation.silence():  # they call a function of TensorFlow 1
            return float(statistics(_Shapes(shapes.__getitem__), op.node_def).value)
    except ValueError:  # "Only NHWC format is supported in flops computations"
        return None
