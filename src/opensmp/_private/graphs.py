"""Function graphs and their operations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import auto_control_deps
from tensorflow.python.ops import handle_data_util

Op = Any
Tensor = Any

_TAG = "_smp_partition"


_STRIPPED_ATTRIBUTES = ("_class", _TAG, "_gradient_op_type")


def new_graph(name: str) -> Any:
    """An empty function graph; a public `tf.Graph` cannot capture eager tensors."""
    return tf.__internal__.FuncGraph(name)


def is_of_function(graph: Any) -> bool:
    """Whether a graph is that of a whole function, and none of a branch or of a loop's body.

    Of the latter, TensorFlow runs only what their results need and what has effects.
    """
    return type(graph) is tf.__internal__.FuncGraph


def captures(graph: Any) -> list[tuple[Tensor, Tensor]]:
    """Pairs (tensor outside, placeholder inside) that a function graph captured."""
    return list(graph.captures)


def captured_from_outside() -> set[int]:
    """Ids of what the function graph under construction, and those around it, have captured."""
    graph: Any = tf.compat.v1.get_default_graph()
    found: set[int] = set()
    while graph is not None and hasattr(graph, "captures"):
        found.update(id(outside) for outside, _ in graph.captures)
        graph = getattr(graph, "outer_graph", None)
    return found


def is_stateful(op: Op) -> bool:
    """Whether an operation has state or side effects; public graphs do not say."""
    return bool(op._is_stateful)


@contextlib.contextmanager
def tagged(graph: Any, partition: int) -> Iterator[None]:
    """Marks all operations that `graph` makes inside with a partition number.

    The public ways (device scopes, name scopes) are either overwritten by the
    user's own or do not reach operations in library code.
    """
    with graph._attr_scope({_TAG: tf.compat.v1.AttrValue(i=partition)}):
        yield


def tag_of(op: Op) -> int | None:
    """The partition number an operation was marked with, or None."""
    try:
        return int(op.get_attr(_TAG))
    except ValueError:
        return None


def strip_attributes(node: Any) -> None:
    """Drops from a NodeDef what means something in the traced graph only."""
    for name in _STRIPPED_ATTRIBUTES:
        node.attr.pop(name, None)


def copy_handle_data(source: Tensor, target: Tensor) -> None:
    """Copies the element type of a variant or resource; without it gradients vanish."""
    if source.dtype in (tf.variant, tf.resource):
        handle_data_util.copy_handle_data(source, target)


def add_control_input(op: Op, before: Op) -> None:
    """Makes an existing operation wait; `tf.control_dependencies` reaches new ones only."""
    op._add_control_input(before)


def set_control_inputs(op: Op, before: Sequence[Op]) -> None:
    """Makes an operation wait for exactly these; graphs have no public way to cut edges."""
    op._remove_all_control_inputs()
    op._add_control_inputs(list(before))


def must_run(graph: Any, ops: Sequence[Op]) -> None:
    """Makes operations part of every run of a function graph under construction.

    TensorFlow itself does so for what it knows to have side effects, and must not be told
    again; collectives it drops when nothing reads their results.
    """
    graph.control_outputs.extend(
        op for op in ops if not is_stateful(op) or op.type.startswith("Collective")
    )


def replace_input(op: Op, index: int, tensor: Tensor) -> None:
    """Rewires one input of an existing operation."""
    op._update_input(index, tensor)


@contextlib.contextmanager
def automatic_control_dependencies() -> Iterator[None]:
    """Orders stateful operations as `tf.function` does, and restores an outer such context.

    The order must be known before a schedule is imposed on the graph, that is
    before `tf.function` itself would add it.
    """
    graph = tf.compat.v1.get_default_graph()
    flag, manager = graph._add_control_dependencies, graph.experimental_acd_manager
    try:
        with auto_control_deps.AutomaticControlDependencies():
            yield
    finally:
        graph._add_control_dependencies = flag
        graph.experimental_acd_manager = manager


def functions_of(node: Any) -> Sequence[str]:
    """Names of the library functions that a NodeDef calls."""
    names = [value.func.name for value in node.attr.values() if value.HasField("func")]
    names += [f.name for value in node.attr.values() for f in value.list.func]
    return names


def function_graphs(op: Op, attribute: str) -> list[Any | None]:
    """The graphs of the functions that an attribute of a call, loop or branch names.

    None stands for a function whose graph is not known. A public graph gives functions as
    GraphDefs only, which have no shapes.
    """
    named = op.get_attr(attribute)
    graphs: list[Any | None] = []
    for function in named if isinstance(named, list) else [named]:
        try:
            graphs.append(op.graph._get_function(function.name).graph)
        except (AttributeError, ValueError):
            graphs.append(None)
    return graphs


def has_custom_gradient(op: Op) -> bool:
    """Whether an operation's gradient is a function given by the user or a library."""
    try:
        return bool(op.get_attr("_gradient_op_type"))
    except ValueError:
        return False
