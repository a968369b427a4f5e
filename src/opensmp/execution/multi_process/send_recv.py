"""Keeps of a whole step's graph what this process runs, and ties it to the other processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opensmp import _private
from opensmp.compiler.schedule.actions import Action
from opensmp.distributed.transport.collective import Transport
from opensmp.distributed.transport.transfer import Transfer
from opensmp.execution.emission.task_graph import Task
from opensmp.execution.multi_process.placer import Layout

Op = Any
Tensor = Any

PREFETCH = 2
"""A receive that its sender waits for is posted so many calls before the call that reads it."""


def without_bridges(live: Sequence[Op]) -> dict[int, Tensor]:
    """Takes the operations that carry gradients out of the way: gradients have been taken.

    They join all arguments of a call, so that each would wait for the others and all would
    seem to be made in one place.

    Args:
        live: Live operations in topological order.

    Returns:
        Id of each tensor that no longer has a reader to the tensor that stands for it.
    """
    instead: dict[int, Tensor] = {}
    for op in live:
        if not _private.is_bridge(op):
            continue
        for output, value in zip(op.outputs, list(op.inputs), strict=True):
            instead[id(output)] = value
            for consumer in output.consumers():
                for index, tensor in enumerate(consumer.inputs):
                    if tensor is output:
                        _private.replace_input(consumer, index, value)
    return instead


def keep_own_part(
    layout: Layout,
    live: Sequence[Op],
    process: int,
    transport: Transport,
    tasks: Mapping[Action, Task],
    sequence: Sequence[Action],
    sends_first: bool = False,
) -> tuple[dict[int, Tensor], list[Op]]:
    """Rewires the graph so that the operations of one process depend on nothing of the others.

    Args:
        layout: Where everything runs.
        live: Live operations in topological order.
        process: Position of this process in the replica.
        transport: Emits sends and receives.
        tasks: The emitted calls.
        sequence: All actions in the order in which the schedule starts them.
        sends_first: Whether a partition's next call waits until the results of the one before
            are on their way, where sending them waits for nobody. With one core a call that
            has begun would else keep them back, and with them those who wait for them.

    Returns:
        Id of each tensor of another process to what was received in its stead; and the
        operations that send or receive, which something must wait for.
    """
    mine = layout.runs[process]
    anchors = _Anchors(layout, live, process, tasks, sequence)
    following = _following(tasks, sequence)
    received: dict[int, Tensor] = {}
    must_run: list[Op] = []
    for number, transfer in enumerate(layout.transfers):
        if transfer.source == process:
            sent = transport.send(transfer, number)
            must_run.append(sent.op)
            if sends_first and transfer.op in following and not sent.waits:
                _private.add_control_input(following[transfer.op], sent.op)
        elif transfer.target == process:
            value, posted, early = transport.receive(transfer, number)
            anchor = anchors.of(transfer, PREFETCH if early else 1)
            if anchor is not None:
                for op in posted:
                    _private.add_control_input(op, anchor)
            must_run.append(value.op)
            received.update({id(t): value for t in transfer.aliases})
            if transfer.after is not None:
                _private.add_control_input(transfer.after, value.op)
    starts = {op: task.first for task in tasks.values() for op in task.ops}
    for op in mine:
        for index, tensor in enumerate(op.inputs):
            if id(tensor) in received:
                value = received[id(tensor)]
                _private.replace_input(op, index, value)
                if starts.get(op, op) is not op:  # a stamp: a call begins when it has all it needs
                    _private.add_control_input(starts[op], value.op)
        elsewhere = [before for before in op.control_inputs if _is_elsewhere(before, layout, mine)]
        if elsewhere:
            kept = [before for before in op.control_inputs if before not in elsewhere]
            _private.set_control_inputs(op, kept)
    return received, must_run


def _following(tasks: Mapping[Action, Task], sequence: Sequence[Action]) -> dict[Op, Op]:
    """Operation of a call to the start of the next call of the same partition."""
    found: dict[Op, Op] = {}
    before: dict[int, Task] = {}
    for action in sequence:
        task = tasks[action]
        if task.partition in before:
            found |= dict.fromkeys(before[task.partition].ops, task.first)
        before[task.partition] = task
    return found


def _is_elsewhere(op: Op, layout: Layout, mine: frozenset[Op]) -> bool:
    return op in layout.home and op not in mine


class _Anchors:
    """After which call of this process a receive is posted.

    A receive takes its memory when it is posted, so it must not be posted much before it is
    needed; and a send waits until its receive is posted, so it must be posted early enough.
    """

    def __init__(
        self,
        layout: Layout,
        live: Sequence[Op],
        process: int,
        tasks: Mapping[Action, Task],
        sequence: Sequence[Action],
    ) -> None:
        self._position = {tasks[action]: index for index, action in enumerate(sequence)}
        mine = layout.runs[process]
        owned = [task for task in self._position if task.last in mine]
        self._calls = [task.last for task in owned]
        self._partitions = [task.partition for task in owned]
        self._starts = [self._position[task] for task in owned]
        self._first_use: dict[Op, int] = {}
        self._use_in_calls(live, mine, {op: i for i, t in enumerate(owned) for op in t.ops})
        self._made: dict[Op, int] = {}
        self._make_in_calls(live, {task.last: i for task, i in self._position.items()})

    def of(self, transfer: Transfer, ahead: int) -> Op | None:
        """The call after which to post the receive of a transfer; None: at once.

        Args:
            transfer: The transfer.
            ahead: So many calls before the one that reads it.
        """
        never = len(self._calls)
        if transfer.after is not None:
            first = self._first_use[transfer.after]
        else:
            first = min(self._first_use.get(t.op, never) for t in transfer.aliases)
        if first == never:  # no call reads it: it is a result, to be there soon after it is made
            made = self._made[transfer.op]
            before = self._calls[: sum(start < made for start in self._starts)]
        else:  # calls of other partitions go their own pace
            before = [
                call
                for call, partition in zip(self._calls[:first], self._partitions, strict=False)
                if partition == self._partitions[first]
            ]
        return before[-ahead] if len(before) >= ahead else None

    def _use_in_calls(
        self, live: Sequence[Op], mine: frozenset[Op], number: Mapping[Op, int]
    ) -> None:
        """Notes for each operation the number of the first own call that needs it."""
        never = len(self._calls)
        for op in reversed(live):
            if op in mine:
                first = min(number.get(op, never), self._first_use.get(op, never))
                self._first_use[op] = first
                for before in (*(t.op for t in op.inputs), *op.control_inputs):
                    self._first_use[before] = min(first, self._first_use.get(before, never))

    def _make_in_calls(self, live: Sequence[Op], number: Mapping[Op, int]) -> None:
        """Notes for each operation the number of the last call of any process before it."""
        for op in live:
            before = (*(t.op for t in op.inputs), *op.control_inputs)
            latest = max((self._made.get(other, 0) for other in before), default=0)
            self._made[op] = max(latest, number.get(op, 0))
