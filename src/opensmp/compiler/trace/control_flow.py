"""Loops, branches and calls: the function graphs that one operation runs, and trip counts."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Op, Tensor

LOOPS = frozenset({"While", "StatelessWhile"})
BRANCHES = frozenset({"If", "StatelessIf", "Case", "StatelessCase"})
CALLS = frozenset({"PartitionedCall", "StatefulPartitionedCall"})
CONTROL_FLOW = LOOPS | BRANCHES | CALLS
"""Types of operations that run function graphs."""

_MOST_STEPS_BACK = 16


class Bodies(NamedTuple):
    """The function graphs that an operation runs.

    Attributes:
        graphs: One graph for a loop or a call; several for a branch, of which one runs.
        skip: Number of the operation's first inputs that are not passed to the functions.
        trips: Number of iterations of a loop; 1 for the others.
    """

    graphs: tuple[Any, ...]
    skip: int
    trips: int


def bodies(op: Op, unknown_size: int) -> Bodies | None:
    """Returns the functions that an operation runs; None if there are none or they are unknown."""
    if op.type not in CONTROL_FLOW:
        return None
    if op.type in LOOPS:
        attributes, skip, trips = ["body"], 0, trip_count(op, unknown_size)
    elif op.type in CALLS:
        attributes, skip, trips = ["f"], 0, 1
    else:
        two = op.type in ("If", "StatelessIf")
        attributes, skip, trips = ["then_branch", "else_branch"] if two else ["branches"], 1, 1
    graphs = [graph for name in attributes for graph in _private.function_graphs(op, name)]
    known = [graph for graph in graphs if graph is not None]
    if any(len(graph.inputs) != len(op.inputs) - skip for graph in known) or not known:
        return None
    return Bodies(tuple(known), skip, trips)


def trip_count(loop: Op, unknown_size: int) -> int:
    """Returns the number of iterations of a loop.

    It is the loop's maximum number of iterations, or the bound of a counter in its condition, if
    these are known. Otherwise it is the length of the longest sequence that the loop iterates over,
    or 1 if there is none.
    """
    counts = [_constant(loop.inputs[1])] if len(loop.inputs) > 1 else []
    counts += [_counted(loop)]
    known = [count for count in counts if count is not None and count >= 0]
    if known:
        return int(min(known))
    lengths = [
        _length(tensor, unknown_size) for tensor in loop.inputs if tensor.dtype == tf.variant
    ]
    return int(max(lengths, default=1))


def _counted(loop: Op) -> float | None:
    """Returns the iterations until a counter ends the loop's condition or one of its conjuncts."""
    (condition,) = _private.function_graphs(loop, "cond")
    (body,) = _private.function_graphs(loop, "body")
    if condition is None or body is None:
        return None
    found = []
    waiting = [condition.outputs[0]]
    for _ in range(_MOST_STEPS_BACK):
        if not waiting:
            break
        op = waiting.pop().op
        if op.type in ("LogicalAnd", "Identity"):
            waiting.extend(op.inputs)
        elif op.type in ("Less", "LessEqual"):
            found.append(_steps(loop, condition, body, op))
    known = [count for count in found if count is not None]
    return min(known) if known else None


def _steps(loop: Op, condition: Any, body: Any, comparison: Op) -> float | None:
    """Returns the iterations while `counter < bound`, if the counter grows by a constant."""
    inputs = {id(tensor): i for i, tensor in enumerate(condition.inputs)}
    counter = inputs.get(id(comparison.inputs[0]))
    limit = inputs.get(id(comparison.inputs[1]))
    if counter is None:
        return None
    if limit is None:
        bound = _constant(comparison.inputs[1])
    elif _unwrapped(body.outputs[limit]) is body.inputs[limit]:
        bound = _constant(loop.inputs[limit])
    else:
        return None
    start = _constant(loop.inputs[counter])
    grown = _unwrapped(body.outputs[counter]).op
    if bound is None or start is None or grown.type not in ("Add", "AddV2"):
        return None
    if grown.inputs[0] is not body.inputs[counter]:
        return None
    step = _constant(grown.inputs[1])
    if step is None or step <= 0:
        return None
    extra = 1 if comparison.type == "LessEqual" else 0
    return max(0, float(np.ceil((bound + extra - start) / step)))


def _unwrapped(tensor: Tensor) -> Tensor:
    while tensor.op.type == "Identity":
        tensor = tensor.op.inputs[0]
    return tensor


def _constant(tensor: Tensor) -> float | None:
    """Returns the value of a constant scalar or the maximum of a constant tensor, else None."""
    for _ in range(_MOST_STEPS_BACK):
        value = tf.get_static_value(tensor)
        if value is not None:
            return float(np.max(value)) if np.size(value) else None
        if tensor.op.type not in ("Max", "Identity", "Cast", "Squeeze", "Reshape"):
            return None
        tensor = tensor.op.inputs[0]
    return None


def _length(sequence: Tensor, unknown_size: int) -> int:
    """Returns the number of elements of a tensor list; 1 if its origin is not a known sequence."""
    if sequence.op.type == "TensorListFromTensor":
        shape = sequence.op.inputs[0].shape
        size = shape[0] if shape.rank else None
        return unknown_size if size is None else int(size)
    if sequence.op.type == "TensorListReserve":
        count = _constant(sequence.op.inputs[1])
        return 1 if count is None or count < 0 else int(count)
    return 1
