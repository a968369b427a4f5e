"""Values of other processes in a function that all processes trace: variables and gradients.

A variable, and with it its gradient, is in one process. All processes trace the user's own
operations around a step with the whole program. A value of another process is at first a
placeholder of the right dtype and static shape. After tracing, each process tells the others which
placeholders it reads, and the owners send these values. A value that no other process reads, such
as a gradient that only updates its own variable, is never sent.

All processes number reads and results alike, because they trace the same program.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Gradient, Tensor
from opensmp.compiler.lowering.sparse_gradients import SameRows
from opensmp.distributed.world import MP_GROUP, current, is_initialized
from opensmp.errors import ElsewhereError
from opensmp.execution.context import current_runner
from opensmp.execution.multi_process.remote_gradient import RemoteGradient

Key = tuple[Any, ...]

_FETCHES = "_smp_fetches"
_ASSIGNED = "_smp_assigned"
_READ = "_smp_read"
_READ_FIRST = (
    "Expected: a read in the train_step itself, or in the tf.function that calls the smp.step "
    "function: `value = tf.convert_to_tensor(variable)`; use the value."
)


@dataclass(frozen=True, eq=False)
class Known:
    """A value that one process owns and others may need.

    Attributes:
        key: Its key, the same in all processes.
        process: Position of the owner in the replica.
        tensor: The value; in other processes a placeholder for it.
        name: Its name in messages.
    """

    key: Key
    process: int
    tensor: Tensor
    name: str


class Fetches:
    """The values of other processes in one function that is being traced."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.known: dict[Key, Known] = {}
        self.is_step = False
        self._of_tensor: dict[int, Known] = {}
        self._numbers: Counter[Key] = Counter()

    def next_key(self, *what: Any) -> Key:
        """Key of the next value of a kind."""
        self._numbers[what] += 1
        return (*what, self._numbers[what])

    def add(self, key: Key, process: int, tensor: Tensor, name: str) -> None:
        """Records a value, or a placeholder for one."""
        known = self.known[key] = Known(key, process, tensor, name)
        self._of_tensor[id(tensor)] = known

    def own(self, key: Key, process: int, tensor: Tensor) -> Tensor:
        """Records a result of this process; copies a tensor that already has another key."""
        if id(tensor) in self._of_tensor:
            with tf.device(tensor.device):
                tensor = tf.identity(tensor)
        self.add(key, process, tensor, "a result")
        return tensor

    def find(self, tensor: Tensor) -> Known | None:
        """The record of a tensor, if there is one."""
        return self._of_tensor.get(id(tensor))

    def placeholder(self, key: Key, process: int, shape: Any, dtype: Any, name: str) -> Tensor:
        """Creates and records a placeholder for a value of another process."""
        tensor = _placeholder(self.graph, shape, dtype, name)
        self.add(key, process, tensor, name)
        return tensor


def _placeholder(graph: Any, shape: Any, dtype: Any, name: str) -> Tensor:
    plain = "".join(c if c.isalnum() else "_" for c in name)
    with graph.as_default(), tf.control_dependencies(None), tf.device(None):
        return tf.compat.v1.placeholder(dtype, shape, name=f"elsewhere/{plain}")


def fetches_of(graph: Any) -> Fetches:
    """The fetches of a function's graph; registers them to be fetched at the end of its trace."""
    if not hasattr(graph, _FETCHES):
        from opensmp.execution.multi_process.remote_transfers import (
            fetch,  # it needs what all this is for
        )

        fetches = Fetches(graph)
        setattr(graph, _FETCHES, fetches)
        _private.at_end_of_trace(graph, lambda must_run: fetch(fetches, must_run))
    fetches = getattr(graph, _FETCHES)
    assert isinstance(fetches, Fetches)
    return fetches


def _around() -> tuple[Any, list[Any]]:
    """The outermost function graph being traced, and the graphs within it, innermost first."""
    *inside, outermost = _private.graphs_around() or [tf.compat.v1.get_default_graph()]
    return outermost, inside


def _is_spread() -> bool:
    return is_initialized() and len(current().mp_group) > 1


def _outermost() -> Fetches | None:
    """Fetches of the function being traced; None within another function, a step or eagerly."""
    if tf.executing_eagerly() or not _is_spread() or current_runner() is not None:
        return None
    graph, inside = _around()
    if inside or not _private.is_traced_by_function(graph):
        return None
    return fetches_of(graph)


def note_step() -> None:
    """Records that the outermost function being traced calls a step: all processes trace it."""
    if tf.executing_eagerly() or not _is_spread() or current_runner() is not None:
        return
    graph, _ = _around()
    if _private.is_traced_by_function(graph):
        fetches_of(graph).is_step = True


# ------------------------------------------------------------------------------------ variables


class _Reads:
    """Handles reads of variables; see `_private.Follower`."""

    def __init__(self) -> None:
        self._is_own = False

    def is_plain(self) -> bool:
        """Whether the default read applies: in one process, in a step, or in `has_read` itself."""
        return not _is_spread() or current_runner() is not None or self._is_own

    def read(self, variable: Any) -> Tensor:
        """A placeholder for the value of a variable of another process."""
        graph, inside = _around()
        home = _private.home_of(variable)
        if not _private.is_traced_by_function(graph):  # the trace is discarded
            return _placeholder(graph, variable.shape, variable.dtype, "value")
        assert home is not None
        _refuse_function(home.name, inside)
        for each in inside:
            _note_read(each, home)
        fetches = fetches_of(graph)
        key = fetches.next_key("read", home.number)
        value = fetches.placeholder(
            key, home.process, variable.shape, variable.dtype, f"Variable {home.name}"
        )
        _private.record_read(variable, value)
        return value

    def has_read(self, variable: Any, value: Tensor) -> None:
        """Gives the owner's value the key that the placeholders in other processes have."""
        home = _private.home_of(variable)
        graph, inside = _around()
        if home is None or not _private.is_traced_by_function(graph):
            return
        if any(map(_private.is_of_function, inside)):
            return  # other processes raise an error for it
        fetches = fetches_of(graph)
        key = fetches.next_key("read", home.number)
        if inside:
            with graph.as_default(), tf.control_dependencies(None), self._reading():
                value = tf.convert_to_tensor(variable)
        fetches.add(key, home.process, value, f"Variable {home.name}")

    def assigns(self, variable: Any) -> None:
        """Records assignments in branches and loops, which cannot fetch the value afterwards."""
        home = _private.home_of(variable)
        _, inside = _around()
        for graph in inside if home is not None else ():
            assert home is not None
            if _is_loop(graph) and home.number in getattr(graph, _READ, ()):
                raise ElsewhereError(_changes(home.name))
            setattr(graph, _ASSIGNED, {*getattr(graph, _ASSIGNED, ()), home.number})

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        self._is_own = True
        try:
            with _private.stop_recording():
                yield
        finally:
            self._is_own = False


def _refuse_function(name: str, inside: Sequence[Any]) -> None:
    if not _private.is_followed():
        raise ElsewhereError(
            f"Variable {name} was read by an optimizer while it updates the variables of this "
            f"process. {_READ_FIRST}"
        )
    inner = next(filter(_private.is_of_function, inside), None)
    if inner is not None:
        raise ElsewhereError(
            f"Variable {name} was read in the tf.function '{inner.name}', which another function "
            f"calls, in a process that does not own it. {_READ_FIRST}"
        )


def _note_read(graph: Any, home: _private.Home) -> None:
    if home.number in getattr(graph, _ASSIGNED, ()):
        raise ElsewhereError(_changes(home.name))
    setattr(graph, _READ, {*getattr(graph, _READ, ()), home.number})


def _is_loop(graph: Any) -> bool:
    return "While" in type(graph).__name__


def _changes(name: str) -> str:
    return (
        f"Variable {name} was read in a branch or a loop that assigns to it, in a process that "
        "does not own it: the value cannot be sent from there. Expected: a read before the branch "
        "or loop, or after it."
    )


_private.follow_reads(_Reads())
_private.follow_traces()


# -------------------------------------------------------------------------------------- results


def known(values: Sequence[Gradient | None]) -> list[Gradient | None]:
    """Replaces each `RemoteGradient` by a placeholder usable in the function that is being traced.

    All processes must call it for the same results. Eagerly, in steps and in functions called by
    other functions nothing can be fetched, and the values are returned unchanged.
    """
    fetches = _outermost()
    if fetches is None:
        return list(values)
    me = current().rank_in(MP_GROUP)
    call = fetches.next_key("result")
    results: list[Any] = []
    for index, value in enumerate(values):
        key = (*call, index)
        if isinstance(value, RemoteGradient):
            results.append(_placeholders(fetches, key, value))
        elif isinstance(value, tf.IndexedSlices):
            indices = fetches.own((*key, "indices"), me, value.indices)
            rows = fetches.own((*key, "values"), me, value.values)
            results.append(_with_rows(value, rows, indices))
        elif isinstance(value, tf.Tensor):
            results.append(fetches.own(key, me, value))
        else:
            results.append(value)
    return results


def _with_rows(slices: tf.IndexedSlices, values: Tensor, indices: Tensor) -> tf.IndexedSlices:
    if values is slices.values and indices is slices.indices:
        return slices
    if isinstance(slices, SameRows):
        return SameRows(values, indices, slices.dense_shape, slices.note)
    return tf.IndexedSlices(values, indices, slices.dense_shape)


def _placeholders(fetches: Fetches, key: Key, value: RemoteGradient) -> Gradient:
    name = f"The gradient of shape {value.shape} of rank {value.process} of the replica"
    sparse = value.sparse
    if sparse is None:
        return fetches.placeholder(key, value.process, value.shape, value.dtype, name)
    with tf.control_dependencies(None):
        shape = tf.constant(value.shape.as_list(), sparse.indices)
    rows = [None, *value.shape[1:]]
    return tf.IndexedSlices(
        fetches.placeholder((*key, "values"), value.process, rows, value.dtype, name),
        fetches.placeholder((*key, "indices"), value.process, [None], sparse.indices, name),
        shape,
    )


def keeper_of(gradient: Gradient) -> int | None:
    """Position in the replica of the only process that owns the origins of a gradient.

    Found in the same way in all processes, by following tensors of the gradient's shape, so that a
    divisor or a norm used for scaling is ignored. None if no result, or results of several
    processes, are found.
    """
    if isinstance(gradient, RemoteGradient):
        return gradient.process
    tensor = gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient
    if not isinstance(tensor, tf.Tensor) or not hasattr(tensor, "graph") or not _is_spread():
        return None
    found: set[int] = set()
    seen = {id(tensor)}
    stack = [tensor]
    while stack:
        each = stack.pop()
        if not each.shape.rank:
            continue
        known = getattr(each.graph, _FETCHES, None)
        entry = None if known is None else known.find(each)
        if entry is not None:
            if entry.key[0] == "result":
                found.add(entry.process)
            continue
        shape = each.shape.as_list()
        for before in _inputs(each):
            is_alike = before.shape.rank is not None and before.shape.as_list() == shape
            if is_alike and id(before) not in seen:
                seen.add(id(before))
                stack.append(before)
    return found.pop() if len(found) == 1 else None


def is_kept_elsewhere(gradient: Gradient) -> bool:
    """Whether the only owner of a gradient's origins is another process."""
    keeper = keeper_of(gradient)
    return keeper is not None and keeper != current().rank_in(MP_GROUP)


_private.leave_to_others(is_kept_elsewhere)


def _inputs(tensor: Tensor) -> list[Tensor]:
    """The inputs of a tensor's operation; within a branch, the captured outer tensors."""
    if tensor.op.inputs or not isinstance(tensor.graph, tf.__internal__.FuncGraph):
        return list(tensor.op.inputs)
    captured = _private.captures(tensor.graph)
    return [outer for outer, inner in captured if inner is tensor and hasattr(outer, "graph")]


def like(gradient: Gradient) -> RemoteGradient:
    """Placeholder for a result that the owner of `gradient` computes from it."""
    if isinstance(gradient, RemoteGradient):
        return gradient
    keeper = keeper_of(gradient)
    assert keeper is not None
    return RemoteGradient.of(gradient, keeper)
