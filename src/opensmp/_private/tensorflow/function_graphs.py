"""Function graphs: tags, captures, control dependencies and hooks at the end of a trace."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import auto_control_deps
from tensorflow.python.ops import handle_data_util, resource_variable_ops

from opensmp.base.types import ConcreteFunction, Op, Tensor

_TAG = "_smp_partition"


_BODIES = "_smp_bodies"


_KEPT = "_smp_kept"


_STRIPPED_ATTRIBUTES = ("_class", _TAG, "_gradient_op_type")


def new_graph(name: str) -> Any:
    """An empty function graph; a public `tf.Graph` cannot capture eager tensors."""
    return tf.__internal__.FuncGraph(name)


def is_of_function(graph: Any) -> bool:
    """Whether a graph is the body of a whole function, not of a branch or a loop.

    In branches and loops, TensorFlow runs only operations that results need or that have effects.
    """
    return type(graph) is tf.__internal__.FuncGraph


def captures(graph: Any) -> list[tuple[Tensor, Tensor]]:
    """Pairs (outer tensor, inner placeholder) that a function graph has captured."""
    return list(graph.captures)


def graphs_around() -> list[Any]:
    """The function graph being traced and its outer function graphs, innermost first."""
    graph: Any = tf.compat.v1.get_default_graph()
    found = []
    # The outermost graph, of eager execution, is not a FuncGraph.
    while isinstance(graph, tf.__internal__.FuncGraph):
        found.append(graph)
        graph = graph.outer_graph
    return found


def captured_from_outside() -> set[int]:
    """Ids of the outer tensors that the current function graph and its outer graphs captured."""
    return {id(outside) for graph in graphs_around() for outside, _ in graph.captures}


def note_body(graph: Any, function: ConcreteFunction) -> None:
    """Notes that a function which was made for this graph alone is called in it."""
    if not hasattr(graph, _BODIES):
        setattr(graph, _BODIES, {})
    getattr(graph, _BODIES)[function.name] = function


def forget_bodies(graph: Any) -> None:
    """Frees the graphs of the functions noted with `note_body`, and of those called by these.

    TensorFlow's runtime has their definitions, but keeps their graphs for as long as the caller
    lives, although it hardly ever reads them again; it would then make them from the definitions.
    """
    bodies = getattr(graph, _BODIES, {})
    setattr(graph, _BODIES, {})
    for function in bodies.values():
        forget_bodies(function.graph)
        keep_functions(graph, [function.graph])
        function.inference_fn._cached_graph = None


def keep_functions(graph: Any, of: Iterable[Any]) -> None:
    """Keeps the functions of other graphs, such as bodies of loops, for the life of a graph.

    TensorFlow removes a function that nothing in Python refers to, even if an operation that was
    copied from one graph to another runs it.
    """
    kept = [function for other in of for function in other._functions.values()]
    setattr(graph, _KEPT, [*getattr(graph, _KEPT, ()), *kept])


def is_stateful(op: Op) -> bool:
    """Whether an operation has state or side effects; the public API does not tell."""
    return bool(op._is_stateful)


@contextlib.contextmanager
def tagged(graph: Any, partition: int) -> Iterator[None]:
    """Context that tags all operations created in `graph` with a partition number.

    Public means do not work: the user's own device scopes override them, and name scopes do not
    reach operations in library code.
    """
    with graph._attr_scope({_TAG: tf.compat.v1.AttrValue(i=partition)}):
        yield


def tag_of(op: Op) -> int | None:
    """The partition number that an operation is tagged with, or None."""
    try:
        return int(op.get_attr(_TAG))
    except ValueError:
        return None


def strip_attributes(node: Any) -> None:
    """Removes attributes from a NodeDef that are valid in the traced graph only."""
    for name in _STRIPPED_ATTRIBUTES:
        node.attr.pop(name, None)


def copy_handle_data(source: Tensor, target: Tensor) -> None:
    """Copies the handle data of a variant or resource tensor; without it, gradients are lost."""
    if source.dtype in (tf.variant, tf.resource):
        handle_data_util.copy_handle_data(source, target)


def add_control_input(op: Op, before: Op) -> None:
    """Adds a control dependency to an existing operation, which public APIs cannot."""
    op._add_control_input(before)


def set_control_inputs(op: Op, before: Sequence[Op]) -> None:
    """Replaces all control dependencies of an operation; public APIs cannot remove any."""
    op._remove_all_control_inputs()
    op._add_control_inputs(list(before))


def must_run(graph: Any, ops: Sequence[Op]) -> None:
    """Makes every run of a function graph under construction execute these operations.

    TensorFlow does so itself for stateful operations, which must not be added twice; but it drops
    collectives whose results are not used.
    """
    graph.control_outputs.extend(
        op for op in ops if not is_stateful(op) or op.type.startswith("Collective")
    )


def replace_input(op: Op, index: int, tensor: Tensor) -> None:
    """Replaces one input of an existing operation."""
    op._update_input(index, tensor)


@contextlib.contextmanager
def automatic_control_dependencies() -> Iterator[None]:
    """Orders stateful operations as `tf.function` does, and restores an outer such context.

    The order must be known before a schedule is applied to the graph, that is before `tf.function`
    itself would add it.
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
    """Control dependencies for a part of a function, after which the trace continues."""


def follow_traces() -> None:
    """Patches the end of traces to apply `at_end_of_trace` and `leave_out`. Idempotent.

    All operations of a function are known only there; there is no public hook.
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
    """Whether a `tf.function` is tracing a graph, as opposed to a scratch graph."""
    return getattr(graph, "experimental_acd_manager", None) is not None


def at_end_of_trace(graph: Any, finish: Callable[[list[Op]], None]) -> None:
    """Calls `finish` with the operations that must run, when a `tf.function` has traced a graph.

    `finish` may add operations, for which no automatic control dependencies are added any more.
    """
    setattr(graph, _AT_END, [*getattr(graph, _AT_END, ()), finish])


def leave_out(graph: Any, ops: Collection[Op]) -> None:
    """Keeps a function from running stateful operations that it has traced.

    Must be called during the trace. Operations that depended on them inherit their control
    dependencies.
    """
    setattr(graph, _LEFT_OUT, getattr(graph, _LEFT_OUT, set()) | set(ops))


def read_nothing(graph: Any, reads: Iterable[Op]) -> None:
    """Redirects unused reads of variables to a variable of this process without a value.

    TensorFlow runs unused reads where its graph optimizer is off, and variables of other processes
    cannot be read.
    """
    for read in reads:
        value = read.outputs[0]
        handle = _without_value(value.dtype, tuple(value.shape)).handle
        replace_input(read, 0, graph.capture(handle))


@functools.cache
def _without_value(dtype: Any, shape: tuple[int, ...]) -> Any:
    """A variable without memory; reading it yields an empty tensor."""
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
    """The graphs of the functions named by an attribute of a call, loop or branch.

    None stands for a function whose graph is not known. The public API returns functions only as
    GraphDefs, which have no shapes.
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
    """Whether an operation has a custom gradient function, of the user or a library."""
    try:
        return bool(op.get_attr("_gradient_op_type"))
    except ValueError:
        return False
