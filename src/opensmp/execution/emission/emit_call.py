"""Emits one call of a lowered function into the step's graph."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.base.types import ConcreteFunction, Op, Tensor
from opensmp.compiler.trace.control_flow import BRANCHES, LOOPS

SECOND_ORDER = "OpensmpSecondOrder"
"""Name of the gradient function of emitted calls, which have no gradient of their own."""


_with_control_flow: weakref.WeakKeyDictionary[ConcreteFunction, bool] = weakref.WeakKeyDictionary()


def has_control_flow(function: ConcreteFunction) -> bool:
    """Whether TensorFlow makes loops or branches part of a function, or of one that it calls."""
    if function not in _with_control_flow:  # queried for each microbatch, and costly to compute
        graph = function.graph.as_graph_def()
        nodes = (node for part in graph.library.function for node in part.node_def)
        _with_control_flow[function] = any(
            node.op in LOOPS | BRANCHES and node.attr["_lower_using_switch_merge"].b
            for node in (*graph.node, *nodes)
        )
    return _with_control_flow[function]


_depths: weakref.WeakKeyDictionary[ConcreteFunction, int] = weakref.WeakKeyDictionary()


def nested_calls(function: ConcreteFunction) -> int:
    """How deep a function's operations call other functions: 0 if none does."""
    if function not in _depths:
        graph = function.graph.as_graph_def()
        bodies = {part.signature.name: part.node_def for part in graph.library.function}
        found: dict[str, int] = {}

        def depth(nodes: Iterable[Any]) -> int:
            values = (value for node in nodes for value in node.attr.values())
            names = (each.name for value in values for each in (value.func, *value.list.func))
            return max((1 + of_function(name) for name in names if name), default=0)

        def of_function(name: str) -> int:
            if name not in found:
                found[name] = 0  # of a function that calls itself
                found[name] = depth(bodies.get(name, ()))
            return found[name]

        _depths[function] = depth(graph.node)
    return _depths[function]


_py_functions: weakref.WeakKeyDictionary[ConcreteFunction, str | None] = weakref.WeakKeyDictionary()

PY_FUNCTION = "_smp_py_function"
"""Attribute of a call's operation: the name of a `tf.py_function` that it runs, or None."""


def py_function_of(function: ConcreteFunction) -> str | None:
    """The name of an operation of `tf.py_function` in a function, if it has one."""
    if function not in _py_functions:
        found = (op.name for op in function.graph.get_operations() if op.type == "EagerPyFunc")
        _py_functions[function] = next(found, None)
    return _py_functions[function]


_attributes: weakref.WeakKeyDictionary[
    ConcreteFunction, dict[tuple[Any, ...], _private.CallAttributes]
] = weakref.WeakKeyDictionary()


def _attributes_of(function: ConcreteFunction, one_thread: bool) -> _private.CallAttributes:
    settings = _private.call_attributes(one_thread)
    made, key = _attributes.setdefault(function, {}), tuple(settings.values())
    if key not in made:
        made[key] = _private.CallAttributes(function, settings, SECOND_ORDER)
    return made[key]


def emit_call(
    function: ConcreteFunction, args: Sequence[Tensor], name: str, one_thread: bool = False
) -> tuple[Op, list[Tensor]]:
    """Emits one call on the current device; returns its operation and its results.

    The call is stateless even if the function has side effects: TensorFlow would chain stateful
    calls in creation order and so serialize the microbatches. The schedule orders the calls
    instead. With `one_thread` it runs in a single thread: if a partition has one core, several only
    evict each other's data from the cache. Ignored for control flow, which does not support it.
    """
    graph = tf.compat.v1.get_default_graph()
    _private.note_body(graph, function)
    attributes = _attributes_of(function, one_thread and not has_control_flow(function))
    call = attributes.call(function, [*args, *function.captured_inputs], name)
    results = list(call.outputs)
    setattr(call, PY_FUNCTION, py_function_of(function))
    for result, output in zip(results, function.outputs, strict=True):
        result.set_shape(output.shape)
        _private.copy_handle_data(output, result)
    return call, results
