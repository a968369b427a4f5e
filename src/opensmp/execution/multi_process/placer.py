"""Decides which process runs which operation of a step, and which tensors are sent.

Every process traces the whole step. An emitted call runs in the process that owns its partition.
The user's own operations around the model run where most bytes of their inputs are, so that a loss
is computed next to the model's output and only a scalar is sent. Stateful operations, such as a
metric update or a print, run in every process.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Op, Tensor
from opensmp.distributed.transport.transfer import Transfer
from opensmp.errors import StepError

ANYWHERE = -1
"""Home of an operation that any process can run, because all have its inputs."""

_RANDOM = (
    "RandomUniform RandomUniformInt RandomStandardNormal TruncatedNormal Multinomial RandomShuffle "
    "RandomGammaGrad ParameterizedTruncatedNormal RandomGamma RandomPoisson RandomPoissonV2"
)
_DRAWS = frozenset(_RANDOM.split())
_READS = ("ReadVariableOp", "Placeholder")


@dataclass(frozen=True, eq=False)
class Layout:
    """Placement of a step's operations and the transfers between processes.

    Attributes:
        home: Maps a live operation to the process that runs it, or to `ANYWHERE`.
        runs: For each process the operations that it runs.
        transfers: The transfers, in the same order in all processes.
    """

    home: Mapping[Op, int]
    runs: tuple[frozenset[Op], ...]
    transfers: tuple[Transfer, ...]


def place_operations(
    live: Sequence[Op],
    *,
    num_processes: int,
    owner: Mapping[Op, int],
    handles: Mapping[int, int],
    wanted: Sequence[tuple[Tensor, int | None]],
    orders: Collection[tuple[Op, Op]] = (),
    saved: Sequence[tuple[Tensor, int]] = (),
) -> Layout:
    """Decides where the live operations of a step run.

    Args:
        live: Live operations in topological order.
        num_processes: Number of processes that hold the model.
        owner: Maps each operation of an emitted call to its process.
        handles: Maps the id of a variable's handle tensor to the process that owns the variable.
        wanted: Pairs of a tensor that is needed in the end, and the process that needs it; None for
            all processes.
        orders: Pairs (before, after) of operations in `owner`: the second must not start before the
            first has ended, although no tensor passes between them.
        saved: Further pairs like those of `wanted` that do not influence the placement.

    Raises:
        StepError: An operation needs variables of several processes in place, or a tensor that
            cannot be sent would have to be.
    """
    home: dict[Op, int] = {}
    targets = {t.op: process for t, process in wanted if process is not None}
    for op in live:
        home[op] = _home(op, home, owner, handles, targets)
    wanted = [*wanted, *saved]
    roots = [(t.op, p) for t, process in wanted for p in _processes(process, num_processes)]
    effects = [op for op in live if op not in owner and _has_effects(op)]
    roots += [(op, p) for op in effects for p in _processes(_at(home[op]), num_processes)]
    roots += [(op, process) for op, process in owner.items() if op in home]
    tracker = _Tracker(home, owner, num_processes, handles)
    for tensor, process in wanted:
        for target in _processes(process, num_processes):
            tracker.want(tensor, target)
    for before, after in orders:
        tracker.order(before, after, home[after])
    tracker.run(roots)
    position = {op: index for index, op in enumerate(live)}
    transfers = sorted(
        tracker.transfers(),
        key=lambda t: (
            position[t.op],
            -1 if t.tensor is None else t.tensor.value_index,
            -1 if t.after is None else position[t.after],
            t.source,
            t.target,
        ),
    )
    _refuse_untransferable(transfers)
    return Layout(home, tuple(map(frozenset, tracker.runs)), tuple(transfers))


def _processes(process: int | None, num_processes: int) -> range:
    return range(num_processes) if process is None else range(process, process + 1)


def _at(home: int) -> int | None:
    return None if home == ANYWHERE else home


def _home(
    op: Op,
    home: Mapping[Op, int],
    owner: Mapping[Op, int],
    handles: Mapping[int, int],
    targets: Mapping[Op, int],
) -> int:
    if op in owner:
        return owner[op]
    owners = {handles[id(t)] for t in op.inputs if id(t) in handles}
    if len(owners) > 1:
        raise StepError(
            f"The operation '{op.name}' ({op.type}) in an smp.step function uses variables of "
            f"the model in place that live in different processes ({sorted(owners)} of the "
            "replica). A tf.function or a loop of your own around several layers' variables "
            "does so: read the variables first, `value = tf.convert_to_tensor(variable)`, and "
            "give it the values."
        )
    if owners:
        return owners.pop()
    if op.type in _DRAWS:
        return 0  # one draw for all processes, which otherwise see different numbers
    if _private.is_stateful(op) and op.type not in _READS:
        return ANYWHERE
    if op in targets:
        return targets[op]
    weights: dict[int, float] = {}
    for tensor in op.inputs:
        process = home[tensor.op]
        if process != ANYWHERE:
            weights[process] = weights.get(process, 0.0) + num_bytes(tensor)
    if not weights:
        return ANYWHERE
    return max(weights, key=lambda process: (weights[process], process))


def _has_effects(op: Op) -> bool:
    return _private.is_stateful(op) and op.type not in (*_READS, *_DRAWS)


def num_bytes(tensor: Tensor) -> float:
    """Size of a tensor in bytes, assuming a large value for unknown dimensions."""
    if tensor.dtype in (tf.resource, tf.variant):
        return 0.0
    if tensor.shape.rank is None:
        return 1e9
    size = 1.0
    for dimension in tensor.shape:
        size *= 1024 if dimension is None else dimension
    return size * (tensor.dtype.size or 1)


class _Tracker:
    """Determines the operations that each process runs and the tensors that it receives."""

    def __init__(
        self,
        home: Mapping[Op, int],
        owner: Mapping[Op, int],
        num_processes: int,
        handles: Mapping[int, int],
    ) -> None:
        self._home, self._owner, self._handles = home, owner, handles
        self.runs: list[set[Op]] = [set() for _ in range(num_processes)]
        self._stack: list[tuple[Op, int]] = []
        self._values: dict[tuple[Any, int, int], list[Tensor]] = {}
        self._orders: dict[tuple[Op, Op, int, int], None] = {}

    def run(self, roots: Collection[tuple[Op, int]]) -> None:
        """Visits all operations that the roots need; a root runs only at its home."""
        self._stack += [(op, p) for op, p in roots if self._runs_at(op, p)]
        while self._stack:
            op, process = self._stack.pop()
            if op in self.runs[process]:
                continue
            self.runs[process].add(op)
            for tensor in op.inputs:
                self.want(tensor, process)
            for before in op.control_inputs:
                if before not in self._home:
                    continue
                if self._runs_at(before, process):
                    self._stack.append((before, process))
                elif op in self._owner and before in self._owner:
                    self.order(before, op, process)

    def want(self, tensor: Tensor, process: int) -> None:
        """Makes a tensor available in a process: runs its operation there, or adds a transfer."""
        op = tensor.op
        if self._runs_at(op, process):
            self._stack.append((op, process))
            return
        key: Any = id(tensor)
        if op.type == "ReadVariableOp" and id(op.inputs[0]) in self._handles:
            key = ("read", id(op.inputs[0]))  # all reads in a step give the same value
        known = self._values.setdefault((key, self._home[op], process), [])
        if not any(tensor is t for t in known):
            known.append(tensor)
        self._stack.append((known[0].op, self._home[op]))

    def order(self, before: Op, after: Op, process: int) -> None:
        """Makes an operation of `process` wait for one of another process."""
        source = self._home[before]
        if source != process:
            self._orders[before, after, source, process] = None
        self._stack.append((before, source))

    def transfers(self) -> list[Transfer]:
        """All transfers: tensors first, then pure ordering."""
        found = [
            Transfer(tensors[0].op, tensors[0], source, target, tuple(tensors))
            for (_, source, target), tensors in self._values.items()
        ]
        return found + [
            Transfer(before, None, source, target, after=after)
            for before, after, source, target in self._orders
        ]

    def _runs_at(self, op: Op, process: int) -> bool:
        return self._home[op] in (ANYWHERE, process)


def _refuse_untransferable(transfers: Sequence[Transfer]) -> None:
    faults = [
        f"{transfer.tensor.name} has the dtype {transfer.tensor.dtype.name}"
        for transfer in transfers
        if transfer.tensor is not None and transfer.tensor.dtype in (tf.resource, tf.variant)
    ]
    if faults:
        raise StepError(
            "These tensors would have to travel from one process to another, but they stand for "
            "something in the memory of one process:\n"
            + "\n".join(f"  - {fault}" for fault in faults)
            + "\nKeep what makes them and what reads them in one partition (smp.partition, or a "
            "plan edited by hand)."
        )
