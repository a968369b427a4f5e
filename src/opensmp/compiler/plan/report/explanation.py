"""Explains the cuts of a plan and the predicted costs of alternative cuts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from opensmp.base import notebook
from opensmp.base.message_text import counted
from opensmp.compiler.format import format_bytes, format_change, format_seconds
from opensmp.compiler.plan.cost_model import Prediction
from opensmp.compiler.plan.partitioner.partitioner import MEMORY_TOLERANCE
from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.plan.unit_graph import CoarseGraph, CutTensor

_MOST_STEPS = 6
_MOST_TENSORS = 3
_WORTH_TIME = 0.005


@dataclass(frozen=True)
class Move:
    """An alternative position of a cut.

    Attributes:
        units: Units that change their partition.
        layers: Names of the moved layers, in graph order.
        source: Their current partition.
        target: Their new partition.
        prediction: Predicted costs of the changed plan.
    """

    units: tuple[int, ...]
    layers: tuple[str, ...]
    source: int
    target: int
    prediction: Prediction


@dataclass(frozen=True)
class Cut:
    """The border between a partition and the next non-empty one.

    Attributes:
        before: The lower partition.
        after: The higher partition.
        last: Name of the last unit before the cut.
        first: Name of the first unit after the cut.
        tensors: Tensors that cross the cut, the largest first.
        moves: Alternative positions, the best first.
    """

    before: int
    after: int
    last: str
    first: str
    tensors: tuple[CutTensor, ...]
    moves: tuple[Move, ...]


@dataclass(frozen=True)
class Explanation:
    """The explanation of a plan, as text when printed.

    Attributes:
        plan: The plan.
        cuts: Its cuts, in order.
    """

    plan: Plan
    cuts: tuple[Cut, ...]

    @property
    def better(self) -> tuple[Move, ...]:
        """Moves that would improve the plan significantly; none for a good plan.

        With `optimize="memory"`, a move must reduce the peak memory by more than the tolerance of
        the partitioner, or the step time by at least half a percent without more memory; with
        `"speed"`, the step time at any memory within the limit.
        """
        moves = [move for cut in self.cuts for move in cut.moves]
        return tuple(move for move in moves if _is_better(self.plan, move.prediction))

    def __str__(self) -> str:
        return "\n".join(_text(self))

    def _repr_html_(self) -> str:
        """What a notebook shows of the explanation."""
        return notebook.preformatted(str(self))


def explain(plan: Plan) -> Explanation:
    """Explains a plan: its costs, its cuts, and the alternatives to each cut.

    The alternatives to a cut move units next to it to the other side. In each direction these are
    the best number of whole layers, of the first few, and the remainder of the adjacent outermost
    layer, such as a block.
    """
    graph, assignment = plan.costs, plan.assignment
    used = [p for p in range(plan.num_partitions) if (assignment == p).any()]
    cuts = []
    for before, after in pairwise(used):
        lower, upper = np.flatnonzero(assignment == before), np.flatnonzero(assignment == after)
        moves = [*_moves(plan, lower[::-1], before, after), *_moves(plan, upper, after, before)]
        cuts.append(
            Cut(
                before=before,
                after=after,
                last=graph.names[lower[-1]],
                first=graph.names[upper[0]],
                tensors=tuple(passing(graph, assignment, before)),
                moves=tuple(sorted(moves, key=lambda move: _aim(plan, move.prediction))),
            )
        )
    return Explanation(plan, tuple(cuts))


def passing(graph: CoarseGraph, assignment: NDArray[np.int64], before: int) -> list[CutTensor]:
    """Returns the tensors produced in partition `before` or lower and read in a higher one."""
    tensors = [
        tensor
        for tensor in graph.tensors
        if assignment[tensor.producer] <= before
        and any(assignment[unit] > before for unit in tensor.consumers)
    ]
    return sorted(tensors, key=lambda tensor: -tensor.forward_bytes)


def _moves(plan: Plan, units: NDArray[np.int64], source: int, target: int) -> list[Move]:
    """Returns the best move of a few layers next to a cut, and that of the outermost layer.

    Units are in topological order, so the nearest ones can always move without making a tensor go
    back to a lower partition.
    """
    steps = [
        count
        for count in range(1, len(units))  # one stays, so that the partition is not empty
        if _changes(plan, units, count, _layer)
    ]
    blocks = [count for count in range(1, len(units)) if _changes(plan, units, count, _block)]
    moves = [_move(plan, units[:count], source, target) for count in steps[:_MOST_STEPS]]
    best = sorted(moves, key=lambda move: _aim(plan, move.prediction))[:1]
    blocks = [count for count in blocks[:1] if count not in map(len, (m.units for m in best))]
    return best + [_move(plan, units[:count], source, target) for count in blocks]


def _move(plan: Plan, units: NDArray[np.int64], source: int, target: int) -> Move:
    other = plan.assignment.copy()
    other[units] = target
    in_order = sorted(int(unit) for unit in units)
    layers = dict.fromkeys(_layer(plan, unit) or plan.costs.names[unit] for unit in in_order)
    return Move(tuple(in_order), tuple(layers), source, target, plan.predict(other))


def _changes(
    plan: Plan, units: NDArray[np.int64], count: int, name: Callable[[Plan, int], str]
) -> bool:
    """Returns whether the unit at `count` is in another layer or block than the previous one."""
    before, after = name(plan, int(units[count - 1])), name(plan, int(units[count]))
    return before != after or not before


def _layer(plan: Plan, unit: int) -> str:
    return plan.costs.layers[unit] if plan.costs.layers else plan.costs.names[unit]


def _block(plan: Plan, unit: int) -> str:
    return _layer(plan, unit).partition("/")[0]


def _aim(plan: Plan, prediction: Prediction) -> tuple[float, ...]:
    """Returns the sort key that the plan's settings minimize."""
    peak, cap = max(prediction.peak_bytes), plan.settings.machine.memory_bytes
    over = 0 if cap is None else max(0, peak - cap)
    if plan.settings.optimize == "memory":
        return (over, peak, prediction.step_seconds)
    return (over, prediction.step_seconds, peak)


def _is_better(plan: Plan, other: Prediction) -> bool:
    """Returns whether a prediction improves the objective significantly without regressions."""
    now = plan.prediction
    peak, before = max(other.peak_bytes), max(now.peak_bytes)
    cap = plan.settings.machine.memory_bytes
    if cap is not None and max(peak, before) > cap:
        return peak < before
    faster = other.step_seconds < (1 - _WORTH_TIME) * now.step_seconds
    if plan.settings.optimize == "memory":
        return peak < (1 - MEMORY_TOLERANCE) * before or (peak <= before and faster)
    return faster


# --- text ------------------------------------------------------------------------------------


def _text(explanation: Explanation) -> Iterable[str]:
    """Yields the lines of an explanation."""
    plan = explanation.plan
    prediction, settings = plan.prediction, plan.settings
    slowest = int(np.argmax(prediction.stage_seconds))
    fullest = int(np.argmax(prediction.peak_bytes))
    yield f"Plan of {plan.model} over {counted(plan.num_partitions, 'partition')}: {settings}"
    yield (
        f"Step: {format_seconds(prediction.step_seconds)} = all stages "
        f"{format_seconds(sum(prediction.stage_seconds))} + {settings.microbatches - 1} x the "
        f"slowest, partition {slowest}, {format_seconds(max(prediction.stage_seconds))}; it is "
        f"{prediction.balance:.2f} x the mean. Bubble {100 * prediction.bubble:.0f} %."
    )
    cap = settings.machine.memory_bytes
    yield (
        f"Memory: at most {format_bytes(max(prediction.peak_bytes))}, in partition {fullest}"
        + (f"; the limit is {format_bytes(cap)}." if cap else "; no limit was given.")
    )
    for partition, choice in enumerate(prediction.recompute):
        if choice.recomputed:
            held = settings.microbatches_in_memory(plan.num_partitions, partition)
            yield (
                f"Partition {partition} recomputes ({choice.level}) in {choice.recomputed} of the "
                f"{counted(held, 'microbatch')} in memory."
            )
    first, second = ("peak memory", "step time")
    if settings.optimize != "memory":
        first, second = second, first
    yield f"The cuts make {first} small, then {second} (optimize={settings.optimize!r})."
    for empty in plan.empty:
        yield f"Partition {empty} is empty."
    for cut in explanation.cuts:
        yield from _cut_text(plan, cut)
    if not explanation.cuts:
        yield "There is no cut: all units are in one partition."


def _cut_text(plan: Plan, cut: Cut) -> Iterable[str]:
    """Yields the lines about one cut and its alternatives."""
    yield ""
    yield f"Cut {cut.before} | {cut.after}, between '{cut.last}' and '{cut.first}':"
    count = "1 tensor passes" if len(cut.tensors) == 1 else f"{len(cut.tensors)} tensors pass"
    forward = sum(tensor.forward_bytes for tensor in cut.tensors)
    backward = sum(tensor.backward_bytes for tensor in cut.tensors)
    yield (
        f"  {count} it per microbatch, {format_bytes(forward)} forward and "
        f"{format_bytes(backward)} backward."
    )
    for tensor in cut.tensors[:_MOST_TENSORS]:
        yield f"    {tensor.name or plan.costs.names[tensor.producer]}: " + format_bytes(
            tensor.forward_bytes
        )
    if len(cut.tensors) > _MOST_TENSORS:
        yield f"    and {len(cut.tensors) - _MOST_TENSORS} more"
    now = plan.prediction
    for move in cut.moves:
        then = move.prediction
        better = ", BETTER" if _is_better(plan, then) else ""
        peak = max(then.peak_bytes)
        yield (
            f"  if {_some(move.layers)} went to partition {move.target}: step "
            f"{format_seconds(then.step_seconds)} "
            f"({format_change(then.step_seconds, now.step_seconds)}), memory {format_bytes(peak)} "
            f"({format_change(peak, max(now.peak_bytes))}), moved bytes "
            f"{format_change(then.cut_bytes, now.cut_bytes)}{better}"
        )


def _some(layers: tuple[str, ...]) -> str:
    if len(layers) <= 2:
        return " and ".join(f"'{layer}'" for layer in layers)
    return f"'{layers[0]}' to '{layers[-1]}' ({len(layers)} layers)"
