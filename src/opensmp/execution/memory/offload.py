"""Offloads residuals: writes them elsewhere after one call, and reads them back before another.

The graph of a step is rewritten once its schedule is known. A tensor that a call returns, or that
arrives for it, and that a much later call of the same partition and microbatch reads, is written
as soon as it exists. The later call reads a copy. The read starts with the call before, so that it
happens behind its computation, and not earlier, so that few copies exist at once. All added edges
lead from a call to a later one in the order of its partition, so that they cannot deadlock.

A partition on an accelerator writes to the memory of the host, one on a CPU to a file, as
ZeRO-Infinity does (Rajbhandari et al., "ZeRO-Infinity: Breaking the GPU Memory Wall for Extreme
Scale Deep Learning", SC 2021).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Op, Tensor
from opensmp.compiler.schedule.actions import Action, Schedule
from opensmp.config.offload import ALL, MOST_RESIDENT, offloads_residuals
from opensmp.distributed.world import World
from opensmp.execution.emission.task_graph import Task, live_operations
from opensmp.execution.memory.offload_places import on_cpu_device, spill_file
from opensmp.execution.memory.spill_file import Spill

LEAST_BYTES = 1 << 20
"""Smaller tensors stay: to write one takes longer than it is worth."""

LEAST_BETWEEN = 3
"""A tensor is offloaded if passes of so many other microbatches run before it is read again."""

_logger = logging.getLogger("opensmp")

_HOST = "/device:CPU:0"
_FLOATS = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
_INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
_DTYPES = frozenset(("bool", *_FLOATS, *_INTEGERS))


class Offloaded(NamedTuple):
    """A tensor that is elsewhere.

    Attributes:
        handle: What stands for it: a number in a file, or the copy on the host.
        like: The tensor, for shape and dtype; may be of another graph.
        spill: Its copies in the file; None if the copy is on the host.
    """

    handle: Tensor
    like: Tensor
    spill: Spill | None


class _Use(NamedTuple):
    """Input number `place` of an operation of the call at a position in a partition's order."""

    position: int
    op: Op
    place: int


@dataclass(eq=False)
class _Life:
    """What the calls of a partition do with a tensor.

    Attributes:
        tensor: The tensor.
        made: Position of the call that returns it; None if it comes from elsewhere.
        uses: Where calls read it, in their order.
        microbatches: The microbatches of these calls, without joint ones.
    """

    tensor: Tensor
    made: int | None = None
    uses: list[_Use] = field(default_factory=list)
    microbatches: set[int] = field(default_factory=set)


class Offload:
    """Offloads the residuals of one step function's graph.

    Args:
        world: The process's configuration and devices.
        device: Returns the device of a partition.
    """

    def __init__(self, world: World, device: Callable[[int], str]) -> None:
        self._world, self._device = world, device
        self._given: dict[int, Offloaded] = {}
        self._reads: dict[int, int] = {}  # of what is given, by id of the value
        self._numbers = itertools.count()

    @property
    def is_wanted(self) -> bool:
        """Whether a partition of this process offloads residuals."""
        setting = self._world.config.offload
        return any(offloads_residuals(setting, p) for p in self._world.my_partitions)

    def given(self, offloaded: Offloaded, handle: Tensor, partition: int) -> Tensor:
        """Returns the value of a tensor that a function of another graph has offloaded.

        `handle` stands for it in this graph.
        """
        here = offloaded._replace(handle=handle)
        value = self._read(here, partition)
        self._given[id(value)] = here
        return value

    def insert(
        self,
        schedule: Schedule,
        tasks: Mapping[Action, Task],
        saved: Iterable[tuple[Tensor, int]],
        roots: Sequence[Op],
    ) -> dict[int, Offloaded]:
        """Rewrites the graph.

        Args:
            schedule: The order of the calls.
            tasks: The calls.
            saved: Tensors that functions of other graphs read later, with their partitions.
            roots: What runs of the graph compute.

        Returns:
            Those of `saved` that are offloaded, by id.
        """
        found: dict[int, Offloaded] = {}
        saved = list(saved)
        self._tell(schedule, tasks, is_whole=not saved and not self._given)
        for partition in self._world.my_partitions:
            if not offloads_residuals(self._world.config.offload, partition):
                continue
            calls = [tasks[action] for action in schedule.orders[partition]]
            later = {id(t): t for t, home in saved if home == partition}
            if not self._given and not later and held_by(calls) <= MOST_RESIDENT:
                continue
            for life in _lives(calls, later.values()):
                if id(life.tensor) in self._given:
                    self._read_again(life, calls, partition)
                elif is_large(life.tensor) and len(life.microbatches) == 1:
                    # Weights, and sums over microbatches, belong to several ones.
                    offloaded = self._offload(life, calls, partition, id(life.tensor) in later)
                    if offloaded is not None and id(life.tensor) in later:
                        found[id(life.tensor)] = offloaded
        live = live_operations(roots) if self._given else []
        others = {id(t) for op in live for t in op.inputs}  # what more than calls read
        for key, offloaded in self._given.items():
            if offloaded.spill is not None:
                offloaded.spill.request(self._reads.get(key, 0) + (key in others))
        return found

    def _tell(self, schedule: Schedule, tasks: Mapping[Action, Task], is_whole: bool) -> None:
        """Warns if no partition holds enough microbatches; all ranks know that of each."""
        setting = self._world.config.offload
        chosen = [
            order for p, order in enumerate(schedule.orders) if offloads_residuals(setting, p)
        ]
        if self._world.rank or not is_whole or all(a.kind == "F" for o in chosen for a in o):
            return
        most = max(held_by([tasks[action] for action in order]) for order in chosen)
        if most <= MOST_RESIDENT:
            _logger.warning(
                "offload: the partitions hold the residuals of %d microbatches at most at once, of "
                "which none is offloaded: only from %d on, some of them can wait elsewhere. More "
                "partitions, or the pipeline 'simple', hold more; or set \"offload\" to %s.",
                most,
                MOST_RESIDENT + 1,
                '"optimizer"' if setting == ALL else '"none"',
            )

    def _offload(
        self, life: _Life, calls: Sequence[Task], partition: int, is_saved: bool
    ) -> Offloaded | None:
        """Offloads a tensor of this graph if it is worth it."""
        first = life.uses[0].position if life.made is None else life.made
        groups = _groups(life, calls, first)
        several = len({call.action.microbatch for call in calls}) > MOST_RESIDENT
        if not groups and not (is_saved and several):
            return None
        offloaded = self._write(life.tensor, partition)
        if first + 2 < len(calls):
            # However slow the writes are, the tensors of at most two calls wait for them.
            _private.add_control_input(calls[first + 2].first, offloaded.handle.op)
        for uses in groups:
            self._use_copy(offloaded, uses, calls, partition, first)
        if offloaded.spill is not None:
            offloaded.spill.own_reads = len(groups)
            if not is_saved:
                offloaded.spill.request(0)
        return offloaded

    def _read_again(self, life: _Life, calls: Sequence[Task], partition: int) -> None:
        """Lets calls read copies, when they need them, of what another graph has offloaded."""
        groups = _groups(life, calls, life.uses[0].position)
        early = life.uses[: len(life.uses) - sum(map(len, groups))]
        for uses in (early, *groups):
            self._use_copy(self._given[id(life.tensor)], uses, calls, partition, -1)
        self._reads[id(life.tensor)] = 1 + len(groups)

    def _use_copy(
        self,
        offloaded: Offloaded,
        uses: Sequence[_Use],
        calls: Sequence[Task],
        partition: int,
        after: int,
    ) -> None:
        """Lets calls read a copy, which is fetched during the call before, and after `after`."""
        value = self._read(offloaded, partition)
        position = uses[0].position
        if position - 2 > after:
            _private.add_control_input(value.op, calls[position - 2].last)
        for use in uses:
            _private.replace_input(use.op, use.place, value)
            first = calls[use.position].first
            if use.op is not first:  # a stamp must wait for all inputs of its call
                _private.add_control_input(first, value.op)

    def _write(self, tensor: Tensor, partition: int) -> Offloaded:
        device = self._device(partition)
        with tf.control_dependencies(None), _private.stop_recording():
            if not on_cpu_device(device):
                with tf.device(_HOST):
                    return Offloaded(tf.raw_ops.Snapshot(input=tensor), tensor, None)
            spill = Spill(spill_file(self._world), tensor.shape, tensor.dtype.as_numpy_dtype)
            with tf.device(device):
                handle = _private.host_call(spill.write, [tensor], tf.int64, stateful=False)
            handle.set_shape([])
            return Offloaded(handle, tensor, spill)

    def _read(self, offloaded: Offloaded, partition: int) -> Tensor:
        handle, like, spill = offloaded
        with (
            tf.control_dependencies(None),
            _private.stop_recording(),
            tf.device(self._device(partition)),
        ):
            if spill is None:
                value = tf.raw_ops.Snapshot(input=handle)
            else:
                # TensorFlow merges equal operations, so that one copy would stay for all readers.
                number = tf.constant(next(self._numbers))
                value = _private.host_call(spill.read, [handle, number], like.dtype, stateful=False)
        value.set_shape(like.shape)
        return value


def held_by(calls: Sequence[Task]) -> int:
    """The most microbatches of which a partition, in this order of calls, holds tensors at once."""
    span: dict[int, tuple[int, int]] = {}
    for position, call in enumerate(calls):
        for microbatch in call.microbatches or (call.action.microbatch,):
            span[microbatch] = span.get(microbatch, (position, 0))[0], position
    return max(
        (sum(a <= i <= b for a, b in span.values()) for i in range(len(calls))),
        default=0,
    )


def is_large(tensor: Tensor) -> bool:
    """Whether a tensor is large enough to be offloaded, and of a known shape and kind."""
    if tensor.dtype.name not in _DTYPES or not tensor.shape.is_fully_defined():
        return False
    return bool(tensor.shape.num_elements() * tensor.dtype.size >= LEAST_BYTES)


def _lives(calls: Sequence[Task], saved: Iterable[Tensor]) -> list[_Life]:
    """The tensors that calls of a partition read or that are saved, with what they do with each."""
    made = {id(t): i for i, call in enumerate(calls) for op in call.ops for t in op.outputs}
    lives: dict[int, _Life] = {}
    for tensor in saved:
        if id(tensor) in made:
            place = made[id(tensor)]
            lives[id(tensor)] = _Life(tensor, place, microbatches={calls[place].action.microbatch})
    for position, call in enumerate(calls):
        for op in call.ops:
            for index, tensor in enumerate(op.inputs):
                maker = made.get(id(tensor))
                if maker == position:
                    continue
                life = lives.get(id(tensor))
                if life is None:
                    life = lives[id(tensor)] = _Life(tensor, maker)
                    if maker is not None:
                        life.microbatches.add(calls[maker].action.microbatch)
                life.uses.append(_Use(position, op, index))
                if not call.microbatches:
                    life.microbatches.add(call.action.microbatch)
    return list(lives.values())


def _groups(life: _Life, calls: Sequence[Task], first: int) -> list[list[_Use]]:
    """The uses that need a copy, in groups that share one.

    A group begins where passes of enough other microbatches have run since the last use.
    """
    groups: list[list[_Use]] = []
    for use in life.uses:
        between = {call.action.microbatch for call in calls[first + 1 : use.position]}
        if len(between - life.microbatches) >= LEAST_BETWEEN:
            groups.append([])
        if groups:
            groups[-1].append(use)
        first = use.position
    return groups
