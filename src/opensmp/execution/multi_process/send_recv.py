"""Prunes the step graph to this process's operations and inserts send and receive operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from opensmp import _private
from opensmp.base.types import Op, Tensor
from opensmp.compiler.schedule.actions import Action
from opensmp.distributed.transport.collective import Transport
from opensmp.distributed.transport.transfer import Transfer
from opensmp.execution.emission.task_graph import Task
from opensmp.execution.multi_process.placer import Layout

PREFETCH = 2
"""Calls by which a receive is posted ahead of the call that reads it, if its sender blocks."""


def without_bridges(live: Sequence[Op]) -> dict[int, Tensor]:
    """Bypasses the bridge operations, which are only needed while gradients are taken.

    A bridge joins all arguments of a call, so that each would wait for all others and all would
    have the same placement. `live` is in topological order. Returns a map from the id of each
    tensor that lost its readers to its replacement.
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


def insert_send_recv(
    layout: Layout,
    live: Sequence[Op],
    process: int,
    transport: Transport,
    tasks: Mapping[Action, Task],
    sequence: Sequence[Action],
    sends_first: bool = False,
) -> tuple[dict[int, Tensor], list[Op]]:
    """Rewires the graph so that one process' operations do not depend on those of others.

    With `sends_first`, a partition's next call waits for the sends of the previous call's results,
    where sends do not block: with one core, it would otherwise delay the sends and thereby the
    receivers.

    Returns a map from the id of each tensor of another process to its received value; and the send
    and receive operations, which the step must wait for.
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
                if starts.get(op, op) is not op:  # a stamp must wait for all inputs of its call
                    _private.add_control_input(starts[op], value.op)
        elsewhere = [before for before in op.control_inputs if _is_elsewhere(before, layout, mine)]
        if elsewhere:
            kept = [before for before in op.control_inputs if before not in elsewhere]
            _private.set_control_inputs(op, kept)
    return received, must_run


def _following(tasks: Mapping[Action, Task], sequence: Sequence[Action]) -> dict[Op, Op]:
    """Maps each operation of a call to the start of the partition's next call."""
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
    """Selects the call of this process after which a receive is posted.

    A receive allocates memory when it is posted, so it must not be posted much earlier than needed;
    a send may block until its receive is posted, so it must be posted early enough.
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
        """The call after which to post the receive of a transfer, `ahead` calls before its reader.

        None: post it immediately.
        """
        never = len(self._calls)
        if transfer.after is not None:
            first = self._first_use[transfer.after]
        else:
            first = min(self._first_use.get(t.op, never) for t in transfer.aliases)
        if first == never:  # a result that no call reads: receive it soon after it is computed
            made = self._made[transfer.op]
            before = self._calls[: sum(start < made for start in self._starts)]
        else:  # calls of other partitions run at their own pace
            before = [
                call
                for call, partition in zip(self._calls[:first], self._partitions, strict=False)
                if partition == self._partitions[first]
            ]
        return before[-ahead] if len(before) >= ahead else None

    def _use_in_calls(
        self, live: Sequence[Op], mine: frozenset[Op], number: Mapping[Op, int]
    ) -> None:
        """Stores for each operation the number of the first own call that needs it."""
        never = len(self._calls)
        for op in reversed(live):
            if op in mine:
                first = min(number.get(op, never), self._first_use.get(op, never))
                self._first_use[op] = first
                for before in (*(t.op for t in op.inputs), *op.control_inputs):
                    self._first_use[before] = min(first, self._first_use.get(before, never))

    def _make_in_calls(self, live: Sequence[Op], number: Mapping[Op, int]) -> None:
        """Stores for each operation the number of the last call of any process before it."""
        for op in live:
            before = (*(t.op for t in op.inputs), *op.control_inputs)
            latest = max((self._made.get(other, 0) for other in before), default=0)
            self._made[op] = max(latest, number.get(op, 0))
