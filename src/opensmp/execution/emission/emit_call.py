"""One call of a lowered function in the step's graph."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.compiler.trace.control_flow import BRANCHES, LOOPS

Op = Any
Tensor = Any
ConcreteFunction = Any

SECOND_ORDER = "OpensmpSecondOrder"
"""Name of the gradient function of emitted calls, which have no gradient of their own."""


_with_control_flow: weakref.WeakKeyDictionary[ConcreteFunction, bool] = weakref.WeakKeyDictionary()


def has_control_flow(function: ConcreteFunction) -> bool:
    """Whether a loop or a branch is in a function or in what it calls."""
    if function not in _with_control_flow:  # asked for each microbatch, and not quick to find out
        graph = function.graph.as_graph_def()
        nodes = (node for part in graph.library.function for node in part.node_def)
        _with_control_flow[function] = any(
            node.op in LOOPS | BRANCHES for node in (*graph.node, *nodes)
        )
    return _with_control_flow[function]


def emit_call(
    function: ConcreteFunction, args: Sequence[Tensor], name: str, one_thread: bool = False
) -> tuple[Op, list[Tensor]]:
    """Emits one call on the current device.

    The call is always of the stateless kind, even where the body has side effects:
    TensorFlow would chain stateful calls in the order of their creation and so run
    the microbatches one after the other. The schedule orders them instead.

    Args:
        function: What to call.
        args: Its arguments, without captured ones.
        name: Name of the operation.
        one_thread: Whether the call is to keep to one thread. Where a partition has one core,
            several threads only drive each other's data out of the cache; calls with control
            flow cannot do it and do as always.

    Returns:
        The operation of the call and its results.
    """
    outputs = function.outputs
    graph = tf.compat.v1.get_default_graph()
    with graph.gradient_override_map({"PartitionedCall": SECOND_ORDER}):
        results = tf.raw_ops.PartitionedCall(
            args=[*args, *function.captured_inputs],
            Tout=[t.dtype for t in outputs],
            f=function,
            name=name,
            **_private.call_attributes(one_thread and not has_control_flow(function)),
        )
    if isinstance(results, tf.Operation) or not results:  # nothing but side effects
        return graph.get_operations()[-1], []
    results = list(results) if isinstance(results, (list, tuple)) else [results]
    for result, output in zip(results, outputs, strict=True):
        result.set_shape(output.shape)
        _private.copy_handle_data(output, result)
    return results[0].op, results
