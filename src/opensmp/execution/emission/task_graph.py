"""Reads task dependencies from the emitted graph and imposes a schedule on it."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from opensmp import _private
from opensmp.base.types import Op
from opensmp.compiler.lowering.extraction import needed
from opensmp.compiler.schedule.actions import Action, Schedule, TaskGraph, default_seconds
from opensmp.errors import StepError
from opensmp.execution.emission.emit_call import PY_FUNCTION


@dataclass(frozen=True)
class Task:
    """An emitted call.

    Attributes:
        action: The action that it performs.
        partition: The partition that it runs in.
        first: The operation to delay until the task may start.
        last: The operation whose completion completes the task.
        ops: All operations of the task.
        microbatches: The microbatches of a joint call, the last of which is that of `action`; empty
            for a call of one microbatch.
    """

    action: Action
    partition: int
    first: Op
    last: Op
    ops: tuple[Op, ...] = ()
    microbatches: tuple[int, ...] = ()


def live_operations(roots: Iterable[Op]) -> list[Op]:
    """All operations that `roots` need, by data and control edges, in topological order."""
    return needed(roots, frozenset(), lambda op: True)


def task_graph(
    tasks: Iterable[Task],
    live: Iterable[Op],
    num_partitions: int,
    segment_seconds: Mapping[int, tuple[float, float] | None] = MappingProxyType({}),
) -> TaskGraph:
    """Dependencies between the live tasks, read from the graph; `live` is in topological order.

    `segment_seconds` has the times of forward and backward passes; unless all are known, all
    segments count as equal.
    """
    listed = list(tasks)
    by_op = {task.last: index for index, task in enumerate(listed)}
    nearest: dict[Op, int] = {}  # bit set of the tasks that an operation directly depends on
    needs: dict[Action, frozenset[Action]] = {}
    device: dict[Action, int] = {}
    for op in live:
        waits = 0
        for producer in (*(t.op for t in op.inputs), *op.control_inputs):
            waits |= nearest[producer]
        if op in by_op:
            task = listed[by_op[op]]
            device[task.action] = task.partition
            needs[task.action] = frozenset(listed[i].action for i in _bits(waits))
            waits = 1 << by_op[op]
        nearest[op] = waits
    seconds = _seconds([task for task in listed if task.action in device], segment_seconds)
    return TaskGraph(device=device, needs=needs, seconds=seconds, num_devices=num_partitions)


def _seconds(
    tasks: Sequence[Task], segment_seconds: Mapping[int, tuple[float, float] | None]
) -> dict[Action, float]:
    """Relative durations; that of a joint task is the sum over its microbatches."""
    apart = {
        task.action: [task.action._replace(microbatch=m) for m in task.microbatches]
        or [task.action]
        for task in tasks
    }
    seconds = default_seconds(action for actions in apart.values() for action in actions)
    known = {action.segment: segment_seconds.get(action.segment) for action in seconds}
    for action, relative in seconds.items():
        if (times := known[action.segment]) is None or None in known.values():
            break  # predicted times and relative ones cannot be compared
        forward, backward = times
        # A whole backward pass counts 2, each half of one 1.
        seconds[action] = relative * (forward if action.kind in "FR" else backward / 2)
    return {action: sum(seconds[a] for a in actions) for action, actions in apart.items()}


def _bits(value: int) -> Iterable[int]:
    while value:
        low = value & -value
        yield low.bit_length() - 1
        value ^= low


def add_schedule_edges(
    schedule: Schedule, tasks: Mapping[Action, Task], partitions: Collection[int] | None = None
) -> int:
    """Adds control edges that make each device follow its order; returns the number of edges added.

    Only those between tasks of `partitions`; None for all.

    Raises:
        StepError: A gradient needs the tape of a `tf.py_function` that is another microbatch's.
    """
    _refuse_shared_tapes(schedule, tasks)
    here = [p for p in range(len(schedule.orders)) if partitions is None or p in partitions]
    pairs = [
        pair
        for pair in schedule.releases
        if all(tasks[action].partition in here for action in pair)
    ]
    for partition in here:
        pairs.extend(itertools.pairwise(schedule.orders[partition]))
    for before, after in pairs:
        _private.add_control_input(tasks[after].first, tasks[before].last)
    return len(pairs)


def _refuse_shared_tapes(schedule: Schedule, tasks: Mapping[Action, Task]) -> None:
    """Raises if a backward pass would find the tape of another microbatch's `tf.py_function`.

    TensorFlow keeps one tape for each `tf.py_function` of a function, that of its last run, until a
    backward pass takes it.
    """
    for order in schedule.orders:
        newest: dict[tuple[int, int], int] = {}  # (segment, call): microbatch
        for action in order:
            where = action.segment, action.call
            name = getattr(tasks[action].last, PY_FUNCTION, None) if action in tasks else None
            if action.kind == "F":
                newest[where] = action.microbatch
            elif name is not None and newest.get(where, action.microbatch) != action.microbatch:
                raise StepError(
                    f"A gradient flows through a tf.py_function in partition "
                    f"{tasks[action].partition} ({name}). TensorFlow keeps its tape of the last "
                    f"forward pass only, and the schedule {schedule.name!r} runs that of "
                    f"microbatch {newest[where]} before the backward pass of microbatch "
                    f"{action.microbatch}. Expected: each backward pass directly after its forward "
                    "pass. Set "
                    '"microbatches": 1; or use it in the last partition with "pipeline": '
                    '"interleaved"; or write it as a tf.custom_gradient with a tf.numpy_function '
                    "for each of the two passes."
                )
