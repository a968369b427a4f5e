"""Python functions that operations of a graph call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

Tensor = Any

_KEPT = "_smp_host_functions"
_KEPT_BY_TENSORFLOW = "_py_funcs_used_in_graph"


def host_call(
    function: Callable[..., Any], inputs: Sequence[Tensor], dtype: Any, *, stateful: bool = True
) -> Any:
    """As `tf.numpy_function`, for a function that lives as long as the graph that calls it.

    TensorFlow keeps the function in the outermost graph. For all `tf.function`s that is the one of
    eager execution: the function, and with it all that it holds, would stay for the life of the
    process. Here the graph of the call keeps it, and so do the function graphs around that one.

    Args:
        function: Takes arrays and gives arrays.
        inputs: Its arguments.
        dtype: Type of its result, or a list of types.
        stateful: As in `tf.numpy_function`.

    Returns:
        As `tf.numpy_function`.
    """
    result = tf.numpy_function(function, list(inputs), dtype, stateful=stateful)
    outermost = tf.compat.v1.get_default_graph()
    around: list[Any] = []
    while isinstance(outermost, tf.__internal__.FuncGraph):
        around.append(outermost)
        outermost = outermost.outer_graph
    kept: list[Any] = getattr(outermost, _KEPT_BY_TENSORFLOW, [])
    for place in reversed(range(len(kept) if around else 0)):
        if function in (kept[place], getattr(kept[place], "__wrapped__", None)):
            registered = kept.pop(place)
            for graph in around:
                setattr(graph, _KEPT, [*getattr(graph, _KEPT, []), registered])
            break
    return result
