"""Extracts parts of a graph as separate functions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.base.types import ConcreteFunction, Op, Tensor
from opensmp.compiler.lowering.finite_flags import finite_flags


def needed(
    roots: Iterable[Op], stop: Collection[int], follow_control: Callable[[Op], bool]
) -> list[Op]:
    """Returns the operations that `roots` depend on, including `roots`, in topological order."""
    order: list[Op] = []
    done: set[Op] = set()
    stack: list[tuple[Op, bool]] = [(op, False) for op in roots]
    while stack:
        op, leaving = stack.pop()
        if leaving:
            order.append(op)
        elif op not in done:
            done.add(op)
            stack.append((op, True))
            stack.extend((t.op, False) for t in op.inputs if id(t) not in stop and t.op not in done)
            controls = _control_inputs(op)
            stack.extend((c, False) for c in controls if c not in done and follow_control(c))
    return order


def _control_inputs(op: Op) -> list[Op]:
    """Returns the control inputs sorted by name; TensorFlow's order differs between processes."""
    inputs = list(op.control_inputs)
    return sorted(inputs, key=lambda other: other.name) if len(inputs) > 1 else inputs


def _without_equal_constants(nodes: Sequence[Any], fetched: Collection[str]) -> list[Any]:
    """NodeDefs of which equal constants are one; those in `fetched` stay.

    Gradients bring a constant for each shape that they name, and so most operations of a backward
    pass. TensorFlow makes them one as well, but only after it has copied the function for each call
    and several times over.
    """
    first: dict[bytes, str] = {}
    instead: dict[str, str] = {}
    kept = []
    for node in nodes:
        if node.op == "Const" and not node.input and node.name not in fetched:
            name, node.name = node.name, ""
            known = first.setdefault(node.SerializeToString(deterministic=True), name)
            node.name = name
            if known != name:
                instead[name] = known
                continue
        kept.append(node)
    for node in kept:
        for i, text in enumerate(node.input):
            mark, name = ("^", text[1:]) if text.startswith("^") else ("", text)
            name, colon, output = name.partition(":")
            if name in instead:
                node.input[i] = mark + instead[name] + colon + output
    return kept


@dataclass(frozen=True, eq=False)
class Part:
    """A part of a graph that can be pasted into other graphs.

    Attributes:
        graph_def: Its operations.
        feeds: Tensors that the caller supplies.
        fetches: Tensors that it computes.
        outside: Maps names to tensors that its operations read from outside.
        captures: Maps the id of a captured tensor's placeholder to the tensor outside of the graph.
        has_state: Whether any of its operations is stateful.
    """

    graph_def: Any
    feeds: tuple[Tensor, ...]
    fetches: tuple[Tensor, ...]
    outside: Mapping[str, Tensor]
    captures: Mapping[int, Tensor]
    has_state: bool

    def paste(self, values: Sequence[Tensor], name: str = "") -> list[Tensor]:
        """Adds a copy of the part to the current graph and returns the copies of the fetches."""
        value = {id(t): given for t, given in zip(self.feeds, values, strict=True)}
        made = [t for t in self.fetches if id(t) not in value and id(t) not in self.captures]
        given = {
            key: tf.convert_to_tensor(value[id(t)] if id(t) in value else self.captures[id(t)])
            for key, t in self.outside.items()
        }
        imported = tf.graph_util.import_graph_def(
            self.graph_def, input_map=given, return_elements=[t.name for t in made], name=name
        )
        value.update({id(t): new for t, new in zip(made, imported or [], strict=True)})
        for t in self.fetches:
            if id(t) in self.captures and id(t) not in value:
                value[id(t)] = tf.convert_to_tensor(self.captures[id(t)])
        return [value[id(t)] for t in self.fetches]


class Extractor:
    """Copies parts of one function graph into functions.

    The copies go through GraphDefs, which preserves loops, branches, nested functions and control
    edges inside the part.

    Args:
        graph: The graph.
        captures: Pairs of a tensor outside and its placeholder in the graph.
        units: Whether to mark the functions as not inlinable, so that their calls can be ordered
            and timed; otherwise TensorFlow may inline them into the caller's graph.
    """

    def __init__(
        self, graph: Any, captures: Sequence[tuple[Tensor, Tensor]], units: bool = True
    ) -> None:
        self._graph = graph
        self._units = units
        self._captures = {id(inner): outer for outer, inner in captures}
        self._nodes: dict[str, Any] = {}
        self._library: dict[str, Any] = {}
        self._size = -1

    def function(
        self,
        name: str,
        feeds: Sequence[Tensor],
        fetches: Sequence[Tensor],
        must_run: Sequence[Op] = (),
        control: Collection[Op] = (),
        is_open: bool = False,
        looked_at: Sequence[Tensor] = (),
        returns_all: bool = False,
    ) -> ConcreteFunction:
        """Extracts the part of the graph between `feeds` and `fetches` as a concrete function.

        Args:
            name: Name of the function.
            feeds: Tensors that become arguments, in this order.
            fetches: Tensors that become results, in this order.
            must_run: Operations to keep even if no result depends on them. If there are any, a zero
                is appended to the results, since TensorFlow drops a call whose results are not
                read.
            control: Operations to reach through control edges, too.
            is_open: See `compiled`.
            looked_at: Tensors to check for finiteness; if there are any, their `finite_flags`
                follow `fetches` in the results.
            returns_all: See `compiled`.
        """
        part = self.part(feeds, (*fetches, *looked_at), must_run, control)

        def body(*args: Tensor) -> list[Tensor]:
            for feed, arg in zip(feeds, args, strict=True):
                _private.copy_handle_data(feed, arg)
            results = part.paste(args)
            for result, fetch in zip(results, fetches, strict=False):
                if fetch.dtype not in (tf.variant, tf.resource):
                    result.set_shape(fetch.shape)  # not part of a GraphDef
            if looked_at:
                results[len(fetches) :] = [finite_flags(results[len(fetches) :])]
            return [*results, tf.constant(0, name="done")] if must_run else results

        is_pure = not must_run and not part.has_state
        return self.compiled(name, body, feeds, is_open, returns_all, is_pure)

    def compiled(
        self,
        name: str,
        body: Callable[..., list[Tensor]],
        specs: Sequence[Tensor],
        is_open: bool = False,
        returns_all: bool = False,
        is_pure: bool = False,
    ) -> ConcreteFunction:
        """Compiles `body`, a function of tensors like `specs`, into a concrete function.

        Calls of it may be inlined if `is_open`, even if the extractor's `units` is set. With
        `returns_all` a call computes all results even if only some of them are read. A function
        without stateful operations, `is_pure`, needs none of TensorFlow's automatic control
        dependencies.
        """
        body.__name__ = name
        attributes = {"_noinline": True} if self._units and not is_open else {}
        if is_pure:
            attributes |= _private.UNORDERED
        with contextlib.ExitStack() as stack:
            if returns_all:
                attributes |= stack.enter_context(_private.unspecialized())
            function = tf.function(body, autograph=False, experimental_attributes=attributes)
            arguments = [tf.TensorSpec(t.shape, t.dtype) for t in specs]
            return function.get_concrete_function(*arguments)

    def part(
        self,
        feeds: Sequence[Tensor],
        fetches: Sequence[Tensor],
        must_run: Sequence[Op] = (),
        control: Collection[Op] = (),
    ) -> Part:
        """Extracts the part of the graph between `feeds` and `fetches`; see `function`."""
        stop = {id(t) for t in feeds} | set(self._captures)
        roots = [t.op for t in fetches if id(t) not in stop] + list(must_run)
        operations = needed(roots, stop, lambda op: op in control)
        members = set(operations)
        outside = {
            t.name: t
            for op in operations
            for t in op.inputs
            if id(t) in stop or t.op not in members
        }
        fetched = {t.op.name for t in fetches} | {op.name for op in must_run}
        graph_def = self._graph_def(operations, fetched)
        has_state = any(map(_private.is_stateful, operations))
        return Part(graph_def, tuple(feeds), tuple(fetches), outside, self._captures, has_state)

    def _graph_def(self, operations: Sequence[Op], fetched: Collection[str]) -> Any:
        """Returns a GraphDef of the operations with all functions that they run."""
        self._refresh()
        part = tf.compat.v1.GraphDef()
        part.versions.CopyFrom(self._graph.graph_def_versions)
        names = {op.name for op in operations}
        nodes = []
        for op in operations:
            node = tf.compat.v1.NodeDef()
            node.CopyFrom(self._nodes[op.name])
            _private.strip_attributes(node)
            kept = [i for i in node.input if not i.startswith("^") or i[1:] in names]
            del node.input[:]
            node.input.extend(kept)
            nodes.append(node)
        part.node.extend(_without_equal_constants(nodes, fetched))
        wanted = [name for node in part.node for name in _private.functions_of(node)]
        added: set[str] = set()
        while wanted:
            function = wanted.pop()
            if function in self._library and function not in added:
                added.add(function)
                part.library.function.add().CopyFrom(self._library[function])
                for node in self._library[function].node_def:
                    wanted.extend(_private.functions_of(node))
        return part

    def _refresh(self) -> None:
        size = len(self._graph.get_operations())
        if size != self._size:  # adding gradients may rewrite loops in place
            graph_def = self._graph.as_graph_def()
            self._nodes = {node.name: node for node in graph_def.node}
            self._library = {f.signature.name: f for f in graph_def.library.function}
            self._size = size
