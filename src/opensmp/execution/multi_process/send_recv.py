"""Prunes the step graph to this process's operations and inserts send and receive operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Op, Tensor
from opensmp.compiler.schedule.actions import Action
from opensmp.distributed.transport.collective import Transport
from opensmp.distributed.transport.transfer import Transfer
from opensmp.execution.emission.task_graph import Task
from opensmp.execution.multi_process.placer import Layout, num_bytes

PREFETCH = 2
"""Calls by which a receive is posted ahead of the call that reads it, at least."""

MOST_AHEAD = 64
"""Microbatches by which a receive is posted ahead, at most: each one occupies a thread."""

AHEAD_BYTES = 64 * 1024 * 1024
"""Memory for the tensors of one kind whose receives are posted ahead."""


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
    wire: Sequence[Transfer],
    live: Sequence[Op],
    process: int,
    transport: Transport,
    tasks: Mapping[Action, Task],
    sequence: Sequence[Action],
    sends_first: bool = False,
    in_flight: int | None = None,
) -> tuple[dict[int, Tensor], list[Op]]:
    """Rewires the graph so that one process' operations do not depend on those of others.

    `wire` has the transfers of `layout` as they are sent, perhaps in another dtype.

    `in_flight` is the number of microbatches that the schedule has in flight, None if unbounded.
    With `sends_first`, a partition's next call waits for the sends of the previous call's results,
    where sends do not block: with one core, it would otherwise delay the sends and thereby the
    receivers.

    Returns a map from the id of each tensor of another process to its received value; and the send
    and receive operations, which the step must wait for.
    """
    mine = layout.runs[process]
    anchors = _Anchors(layout, live, process, tasks, sequence, in_flight)
    following = _following(tasks, sequence)
    received: dict[int, Tensor] = {}
    must_run: list[Op] = []
    for number, (transfer, sendable) in enumerate(zip(layout.transfers, wire, strict=True)):
        if transfer.source == process:
            sent = transport.send(sendable, number)
            must_run.append(sent.op)
            if sends_first and transfer.op in following and not sent.waits:
                _private.add_control_input(following[transfer.op], sent.op)
        elif transfer.target == process:
            value, posted, early = transport.receive(sendable, number)
            if transfer.tensor is not None and value.dtype != transfer.tensor.dtype:
                value = tf.cast(value, transfer.tensor.dtype)
            anchor = anchors.of(transfer, early)
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

    A sender can only send what has been asked for, and the request takes its time to get there.
    With K microbatches in flight, a tensor of microbatch m is computed when microbatch m - K has
    left. So a receive that is posted after the same call of microbatch m - K is always there before
    the tensor, and only the way of the tensor itself is waited for. A receive allocates memory when
    it is posted: that of K tensors of each kind.
    """

    def __init__(
        self,
        layout: Layout,
        live: Sequence[Op],
        process: int,
        tasks: Mapping[Action, Task],
        sequence: Sequence[Action],
        in_flight: int | None,
    ) -> None:
        self._position = {tasks[action]: index for index, action in enumerate(sequence)}
        mine = layout.runs[process]
        self._owned = [task for task in self._position if task.last in mine]
        self._starts = [self._position[task] for task in self._owned]
        self._in_flight = MOST_AHEAD if in_flight is None else min(in_flight, MOST_AHEAD)
        self._first_use: dict[Op, int] = {}
        self._use_in_calls(live, mine, {op: i for i, t in enumerate(self._owned) for op in t.ops})
        self._made: dict[Op, int] = {}
        self._make_in_calls(live, {task.last: i for task, i in self._position.items()})

    def of(self, transfer: Transfer, early: bool) -> Op | None:
        """The call after which to post the receive of a transfer; None: post it immediately.

        `early` says whether its sender needs the request; otherwise it is posted when it is read.
        """
        never = len(self._owned)
        if transfer.after is not None:
            first = self._first_use[transfer.after]
        else:
            first = min(self._first_use.get(t.op, never) for t in transfer.aliases)
        ahead = self._ahead(transfer)
        if first == never:  # a result that no call reads: receive it soon after it is computed
            made = self._made[transfer.op]
            before = self._owned[: sum(start < made for start in self._starts)]
            return _last(before, PREFETCH * ahead if early else 1)
        reader = self._owned[first]
        # Calls of other partitions run at their own pace.
        before = [task for task in self._owned[:first] if task.partition == reader.partition]
        if not early:
            return _last(before, 1)
        most = reader.action.microbatch - ahead
        leaving = [
            number
            for number, task in enumerate(before[: -(PREFETCH - 1)])
            if _kind(task) == _kind(reader) and task.action.microbatch <= most
        ]
        return before[leaving[-1]].last if leaving else None

    def _ahead(self, transfer: Transfer) -> int:
        """Microbatches by which to post the receive ahead of its reader."""
        if transfer.tensor is None:
            return self._in_flight
        return max(
            1, min(self._in_flight, int(AHEAD_BYTES // max(1.0, num_bytes(transfer.tensor))))
        )

    def _use_in_calls(
        self, live: Sequence[Op], mine: frozenset[Op], number: Mapping[Op, int]
    ) -> None:
        """Stores for each operation the number of the first own call that needs it."""
        never = len(self._owned)
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


def _kind(task: Task) -> tuple[str, int, int]:
    """What the calls of different microbatches have in common."""
    return task.action.kind, task.action.segment, task.action.call


def _last(calls: Sequence[Task], ahead: int) -> Op | None:
    return calls[-ahead].last if len(calls) >= ahead else None
