"""Function graphs and their operations."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import auto_control_deps
from tensorflow.python.ops import handle_data_util, resource_variable_ops

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
        with _Ordering():
            yield
    finally:
        graph._add_control_dependencies = flag
        graph.experimental_acd_manager = manager


class _Ordering(auto_control_deps.AutomaticControlDependencies):
    """Dependencies within a part of a function, which goes on afterwards."""


def follow_traces() -> None:
    """Lets traces end as `at_end_of_trace` and `leave_out` say. Idempotent.

    Only there all operations are known that a function is going to run; there is no public hook.
    """
    owner = auto_control_deps.AutomaticControlDependencies
    original = owner.__exit__
    if hasattr(original, _FOLLOWED):
        return

    @functools.wraps(original)
    def leave(self: Any, kind: Any, error: Any, trace: Any) -> None:
        original(self, kind, error, trace)
        graph = getattr(self, "_graph", None)
        if kind is not None or graph is None or isinstance(self, _Ordering):
            return
        out: set[Op] = getattr(graph, _LEFT_OUT, set())
        if out:
            self.ops_which_must_run -= out
            _wait_past(graph, out)
        for finish in getattr(graph, _AT_END, ()):
            finish(list(self.ops_which_must_run))

    setattr(leave, _FOLLOWED, True)
    owner.__exit__ = leave


_FOLLOWED = "_smp_followed"


_LEFT_OUT = "_smp_left_out"


_AT_END = "_smp_at_end"


def is_traced_by_function(graph: Any) -> bool:
    """Whether a `tf.function` is tracing a graph, and not something that throws it away."""
    return getattr(graph, "experimental_acd_manager", None) is not None


def at_end_of_trace(graph: Any, finish: Callable[[list[Op]], None]) -> None:
    """Has a function called when a `tf.function` has traced its own.

    Args:
        graph: That of the function being traced.
        finish: Takes the operations that run though nothing may read what they give. It may add
            operations, whose order nobody adds to any more.
    """
    setattr(graph, _AT_END, [*getattr(graph, _AT_END, ()), finish])


def leave_out(graph: Any, ops: Collection[Op]) -> None:
    """Keeps a function from running operations with effects that it has traced.

    To be called while it is traced. What was to wait for them waits for what they wait for.
    """
    setattr(graph, _LEFT_OUT, getattr(graph, _LEFT_OUT, set()) | set(ops))


def read_nothing(graph: Any, reads: Iterable[Op]) -> None:
    """Makes reads of variables that nothing needs read one of this process that has no value.

    TensorFlow runs such reads all the same where its graph optimizer is switched off, and a
    variable of another process cannot be read.

    Args:
        graph: A function graph under construction.
        reads: `ReadVariableOp`s whose results nothing in the graph reads that runs.
    """
    for read in reads:
        value = read.outputs[0]
        handle = _without_value(value.dtype, tuple(value.shape)).handle
        replace_input(read, 0, graph.capture(handle))


@functools.cache
def _without_value(dtype: Any, shape: tuple[int, ...]) -> Any:
    """A variable without memory; what is read of it is empty."""
    with tf.init_scope(), tf.device("CPU:0"):
        return resource_variable_ops.UninitializedVariable(
            trainable=False, name="nothing", shape=shape, dtype=dtype
        )


def _wait_past(graph: Any, out: set[Op]) -> None:
    for op in graph.get_operations():
        if op in out or not any(each in out for each in op.control_inputs):
            continue
        kept: dict[Op, None] = {}
        seen: set[Op] = set()
        stack = list(op.control_inputs)
        while stack:
            before = stack.pop()
            if before not in out:
                kept[before] = None
            elif before not in seen:
                seen.add(before)
                stack.extend(before.control_inputs)
        set_control_inputs(op, list(kept))


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
