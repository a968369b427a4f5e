"""Records which operations of a graph belong to which call of which layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from opensmp import _private


@dataclass(frozen=True)
class LayerSpan:
    """The operations `start <= index < stop` created by one call of one layer.

    Attributes:
        layer: The Keras layer.
        depth: Number of enclosing layer calls; 0 for the model itself.
        start: Index of its first operation in the graph.
        stop: One past the index of its last operation.
    """

    layer: Any
    depth: int
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{'  ' * self.depth}{self.layer.name}[{self.start}:{self.stop}]"


@contextlib.contextmanager
def recorded_spans(graph: Any) -> Iterator[list[LayerSpan]]:
    """Yields a list that fills with the spans of layer calls in `graph`, ordered by start.

    Calls inside nested functions (loop bodies, branches) belong to the span of the operation that
    runs the function, and are not listed.
    """
    spans: list[LayerSpan] = []
    stack: list[Any] = []

    @contextlib.contextmanager
    def around(layer: Any) -> Iterator[None]:
        if tf.compat.v1.get_default_graph() is not graph:
            yield
            return
        start, depth = len(graph.get_operations()), len(stack)
        stack.append(layer)
        position = len(spans)  # outer calls begin first and must be listed first
        spans.append(LayerSpan(layer, depth, start, start))
        try:
            yield
        finally:
            stack.pop()
            stop = len(graph.get_operations())
            spans[position] = LayerSpan(layer, depth, start, stop)

    with _private.layer_calls(around):
        yield spans
