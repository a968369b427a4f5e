"""Python functions called by graph operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from opensmp._private.tensorflow.function_graphs import graphs_around
from opensmp.base.types import Tensor

_KEPT = "_smp_host_functions"
_KEPT_BY_TENSORFLOW = "_py_funcs_used_in_graph"


def host_call(
    function: Callable[..., Any], inputs: Sequence[Tensor], dtype: Any, *, stateful: bool = True
) -> Any:
    """Like `tf.numpy_function`, but frees the function together with the graph that calls it.

    TensorFlow stores the function in the outermost graph. For every `tf.function` that is the graph
    of eager execution, so that the function and all that it holds would stay for the life of the
    process. Here the graph of the call and its outer function graphs store it.
    """
    result = tf.numpy_function(function, list(inputs), dtype, stateful=stateful)
    around = graphs_around()
    outermost = around[-1].outer_graph if around else None
    kept: list[Any] = getattr(outermost, _KEPT_BY_TENSORFLOW, [])
    for place in reversed(range(len(kept))):
        if function in (kept[place], getattr(kept[place], "__wrapped__", None)):
            registered = kept.pop(place)
            for graph in around:
                setattr(graph, _KEPT, [*getattr(graph, _KEPT, []), registered])
            break
    return result
