"""Tags operations with the partition that the user requested.

While a model is traced, operations of the trace graph are tagged. While a Functional model is being
built, the nodes of its layer graph are tagged, and their operations inherit the tag when the model
is traced later.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.errors import PartitionError

_local = threading.local()
_node_tags: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def traced_graph() -> Any | None:
    """Returns the graph that a model is being traced into on this thread, or None."""
    return getattr(_local, "graph", None)


@contextlib.contextmanager
def tracing_into(graph: Any) -> Iterator[None]:
    """Makes `tag` apply to the operations of `graph`, also through Functional nodes."""
    outer, _local.graph = traced_graph(), graph
    try:
        with _private.functional_nodes(_around_node):
            yield
    finally:
        _local.graph = outer


@contextlib.contextmanager
def tag(partition: int) -> Iterator[None]:
    """Tags everything created inside with `partition`; the innermost tag applies."""
    graph = traced_graph()
    if graph is None:
        thread = threading.get_ident()

        def mark(node: Any) -> None:
            if threading.get_ident() == thread:
                _node_tags[node] = partition

        with _private.new_nodes(mark):
            yield
    elif _private.in_symbolic_scope():
        yield
    elif tf.compat.v1.get_default_graph() is not graph:
        raise PartitionError(
            f"smp.partition({partition}) was entered inside a loop body, a branch or a nested "
            "tf.function. Such a body runs as one operation and lies in one partition as a "
            "whole. Put the smp.partition context around the loop, the branch or the function "
            "call instead, or write the loop as a Python loop."
        )
    else:
        with _private.tagged(graph, partition):
            yield


def _around_node(node: Any) -> contextlib.AbstractContextManager[None]:
    partition = _node_tags.get(node)
    return contextlib.nullcontext() if partition is None else tag(partition)
