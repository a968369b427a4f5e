"""Which transfers of a step may use the same buffer one after the other.

A buffer is free for another tensor once the call that reads the first one has started. With a bound
on the microbatches in flight, the schedule makes the sender wait for such a call again and again,
so that the number of buffers grows with that bound and not with the number of microbatches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from opensmp.base.types import Op, Tensor
from opensmp.compiler.schedule.actions import Action, Schedule
from opensmp.distributed.transport.transfer import Transfer
from opensmp.execution.emission.task_graph import Task

_SUMS = frozenset({"AddN", "AddV2", "Identity"})


def read_before(
    transfers: Sequence[Transfer],
    tasks: Mapping[Action, Task],
    schedule: Schedule,
    sequence: Sequence[Action],
    runs: Sequence[Collection[Op]],
    is_open: Collection[Action] = (),
) -> list[int]:
    """Returns for each transfer which others have been read in every run before it is sent.

    Bit `i` of element `k` says that transfer `i` is read before `k` is sent. `sequence` has all
    actions in the order in which the schedule starts them, `runs` the operations of each process,
    `is_open` the actions whose calls may return a result before they have read all arguments.
    """
    number = {action: i for i, action in enumerate(sequence)}
    action_of = {op: action for action in sequence for op in tasks[action].ops}
    before = _before(tasks, schedule, sequence, number, action_of, is_open)
    starts = []  # for each transfer the calls that start after its tensor has been read
    for transfer in transfers:
        readers = [
            op
            for tensor in _tensors(transfer)
            for op in tensor.consumers()
            if op in runs[transfer.target]
        ]
        # What other processes compute too does not show that the target has read the tensor.
        only_there = [op for op in readers if sum(op in run for run in runs) == 1]
        calls = _nearest(only_there, action_of, _readers) - set(is_open)
        starts.append(sum(1 << number[action] for action in calls))
    found = []
    for transfer in transfers:
        past = 0
        for action in _nearest([transfer.op], action_of, _producers) - set(is_open):
            past |= before[action] | 1 << number[action]
        found.append(sum(1 << i for i, reads in enumerate(starts) if reads & past))
    return found


def _tensors(transfer: Transfer) -> list[Tensor]:
    return [*transfer.aliases, *([] if transfer.tensor is None else [transfer.tensor])]


def _before(
    tasks: Mapping[Action, Task],
    schedule: Schedule,
    sequence: Sequence[Action],
    number: Mapping[Action, int],
    action_of: Mapping[Op, Action],
    is_open: Collection[Action],
) -> dict[Action, int]:
    """The calls that have started and ended before each call starts, as bit sets.

    Of the data that a call waits for, only that counts which TensorFlow cannot optimize away, as it
    does with shapes.
    """
    waits_for: dict[Action, set[Action]] = {action: set() for action in sequence}
    for earlier, later in itertools.chain(
        schedule.releases, *map(itertools.pairwise, schedule.orders)
    ):
        waits_for[later].add(earlier)
    before: dict[Action, int] = {}
    for action in sequence:
        before[action] = 0
        arguments = [producer for op in tasks[action].ops for producer in _producers(op)]
        producers = _nearest(arguments, action_of, _producers) - {action}
        for earlier in waits_for[action] | producers:
            if earlier not in is_open and earlier in before:
                before[action] |= before[earlier] | 1 << number[earlier]
    return before


def _nearest(
    ops: Iterable[Op], action_of: Mapping[Op, Action], step: Callable[[Op], Iterable[Op]]
) -> set[Action]:
    """The calls among operations, or to which `step` leads from them through sums alone."""
    found: set[Action] = set()
    stack, seen = list(ops), set()
    while stack:
        op = stack.pop()
        if op in action_of:
            found.add(action_of[op])
        elif op.type in _SUMS and op not in seen:
            seen.add(op)
            stack.extend(step(op))
    return found


def _readers(op: Op) -> list[Op]:
    return [reader for t in op.outputs for reader in t.consumers()]


def _producers(op: Op) -> list[Op]:
    return [t.op for t in op.inputs]
