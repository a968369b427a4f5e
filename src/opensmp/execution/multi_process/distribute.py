"""Divides a step that all processes of a replica have traced among these processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Op, Tensor
from opensmp.compiler.schedule.actions import Action, Schedule
from opensmp.compiler.schedule.simulate import simulate
from opensmp.compiler.trace.variables import is_keras, tf_variable
from opensmp.distributed.collectives.consistency import agree
from opensmp.distributed.collectives.objects import allgather_objects
from opensmp.distributed.launch.cluster import needed
from opensmp.distributed.transport.collective import CollectiveTransport, Transport
from opensmp.distributed.transport.shared_memory import rooms, share
from opensmp.distributed.transport.shared_memory_transport import SharedMemoryTransport
from opensmp.distributed.transport.transfer import Transfer
from opensmp.distributed.watchdog import recovery
from opensmp.distributed.watchdog.call_log import Wait, waits
from opensmp.distributed.watchdog.traced_calls import not_constant
from opensmp.distributed.world import MP_GROUP, World
from opensmp.errors import CommunicationError
from opensmp.execution.emission.task_graph import Task
from opensmp.execution.multi_process.buffer_reuse import read_before
from opensmp.execution.multi_process.placer import ANYWHERE, Layout, place_operations
from opensmp.execution.multi_process.remote_gradient import OwnedBy
from opensmp.execution.multi_process.send_recv import insert_send_recv
from opensmp.execution.multi_process.wire import on_the_wire

_HOST = "/device:CPU:0"


@dataclass(frozen=True, eq=False)
class Traced:
    """The whole step as traced by one process.

    Attributes:
        live: Live operations in topological order.
        tasks: The emitted calls.
        is_open: Whether an action's call may return a result before it has read all arguments.
        schedule: The schedule; its `graph` is not None.
        results: Tensors to return.
        state: Pairs of a variable and its value after the step.
        reads: Pairs of a variable and a read of it.
        homes: Maps the id of a variable to its partition.
        gradients: Pairs of a variable and its gradient, a tensor or `tf.IndexedSlices`.
        everywhere: Further tensors, which all processes need.
        saved: Pairs of a tensor and the partition whose process alone needs it.
        placed: Maps further operations, which are not part of a call, to their partition.
    """

    live: Sequence[Op]
    tasks: Mapping[Action, Task]
    is_open: Callable[[Action], bool]
    schedule: Schedule
    results: Sequence[Tensor]
    state: Sequence[tuple[Any, Tensor]]
    reads: Sequence[tuple[Any, Tensor]]
    homes: Mapping[int, int]
    gradients: Sequence[tuple[Any, Any]]
    everywhere: Sequence[Tensor] = ()
    saved: Sequence[tuple[Tensor, int]] = ()
    placed: Mapping[Op, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Kept:
    """The part of a step that this process runs.

    Attributes:
        results: Like those of `Traced`, with a `OwnedBy` in place of gradients that other processes
            own.
        state: The assignments that this process makes.
        must_run: Operations that must run even if nothing here reads them: without the receive, the
            sender would wait forever.
        everywhere: Like that of `Traced`.
        saved: Like that of `Traced`; this process does not compute the tensors of other processes.
    """

    results: list[Tensor | OwnedBy]
    state: list[tuple[Any, Tensor]]
    must_run: list[Op]
    everywhere: list[Tensor]
    saved: list[tuple[Tensor, int]]


def partition_step(traced: Traced, world: World, name: str) -> Kept:
    """Divides a traced step among the processes of a replica."""
    me = world.rank_in(MP_GROUP)
    owner = _owners(traced, world)
    home_of = {
        id(variable): world.owner(traced.homes[id(variable)])
        for variable, _ in (*traced.reads, *traced.state)
        if is_keras(variable) and id(variable) in traced.homes
    }
    graph = tf.compat.v1.get_default_graph()
    handles = _handles(graph) | {
        id(_handle(read)): home_of[id(variable)]
        for variable, read in traced.reads
        if id(variable) in home_of
    }
    keepers = _Keepers(traced.gradients, owner, home_of)
    kept_by = [keepers.of(tensor) for tensor in traced.results]
    wanted = [
        (tensor, None if keeper is None else keeper.process)
        for tensor, keeper in zip(traced.results, kept_by, strict=True)
    ]
    wanted += [(value, home_of.get(id(variable))) for variable, value in traced.state]
    wanted += [(tensor, None) for tensor in traced.everywhere]
    layout = place_operations(
        traced.live,
        num_processes=len(world.mp_group),
        owner=owner,
        handles=handles,
        wanted=wanted,
        orders=_orders(traced, world),
        saved=[(tensor, world.owner(partition)) for tensor, partition in traced.saved],
    )
    number = agree(world.mp_group, name, _description(traced, layout))
    runs = RunLog(name, world.mp_group)
    run = runs.begin()
    sequence = _sequence(traced.schedule)

    def earlier() -> list[int]:
        is_open = [action for action in sequence if traced.is_open(action)]
        return read_before(
            layout.transfers, traced.tasks, traced.schedule, sequence, layout.runs, is_open
        )

    calls = {op for task in traced.tasks.values() for op in task.ops}
    exact = {id(tensor) for tensor, _ in (*wanted, *traced.saved)}
    wire = on_the_wire(layout, world.config.wire_dtype, calls, exact, me)
    transport = transport_of(wire, world, number, run, earlier)
    received, must_run = insert_send_recv(
        layout,
        wire,
        traced.live,
        me,
        transport,
        traced.tasks,
        sequence,
        sends_first=world.one_core_each,
        in_flight=traced.schedule.active_microbatches,
    )
    runs.end(run, must_run, transport)
    others = _of_others(graph, layout, handles, me)
    _private.leave_out(graph, others)
    _private.read_nothing(
        graph,
        [
            op
            for op in others
            if op.type == "ReadVariableOp" and handles.get(id(op.inputs[0]), me) != me
        ],
    )
    results = [
        keeper if keeper is not None and keeper.process != me else received.get(id(tensor), tensor)
        for tensor, keeper in zip(traced.results, kept_by, strict=True)
    ]
    state = [
        (variable, received.get(id(value), value))
        for variable, value in traced.state
        if home_of.get(id(variable), me) == me
    ]
    everywhere = [received.get(id(tensor), tensor) for tensor in traced.everywhere]
    saved = [(received.get(id(tensor), tensor), partition) for tensor, partition in traced.saved]
    return Kept(results, state, must_run, everywhere, saved)


def on_several_machines(world: World) -> bool:
    """Whether the processes of a replica are on several machines."""
    if len(world.mp_group) == 1:
        return False
    peers = needed("A step of several processes", world.mp_group).meeting.peers
    return len({peers[rank].machine for rank in world.mp_group}) > 1


def _owners(traced: Traced, world: World) -> dict[Op, int]:
    """Maps the live operations that run in a partition to its process."""
    members = set(traced.live)
    calls = ((op, task.partition) for task in traced.tasks.values() for op in task.ops)
    pairs = (*calls, *traced.placed.items())
    return {op: world.owner(partition) for op, partition in pairs if op in members}


def _orders(traced: Traced, world: World) -> list[tuple[Op, Op]]:
    """Pairs of operations of different processes that the schedule runs one after the other."""
    tasks = traced.tasks
    return [
        (tasks[before].last, tasks[after].first)
        for before, after in traced.schedule.releases
        if world.owner(tasks[before].partition) != world.owner(tasks[after].partition)
    ]


def transport_of(
    transfers: Sequence[Transfer],
    world: World,
    number: int,
    run: Tensor,
    earlier: Callable[[], Sequence[int]] = tuple,
) -> Transport:
    """Creates the transport: shared memory within a machine, collectives otherwise.

    `transfers` include those between other processes of the replica, `number` is that of the trace,
    and `run` the result of `RunLog.begin`. `earlier` computes `read_before`, for shared memory.
    """
    collective = CollectiveTransport(world.mp_group, _HOST, number)
    if world.config.transport == "collective":
        return collective
    peers = needed("A step of several processes", world.mp_group).meeting.peers
    all_rooms = rooms(transfers, [peers[rank].machine for rank in world.mp_group], earlier())
    me = world.rank_in(MP_GROUP)
    with tf.init_scope():
        memories = share(
            all_rooms,
            me,
            lambda value: allgather_objects(value, world.mp_group, "sharing memory"),
        )
    return SharedMemoryTransport(collective, all_rooms, memories, me, _HOST, run)


class RunLog:
    """Emits operations that log the start and end of a run of the step; see `call_log`.

    The log tells a rank that waits in a step because others do not run it from one that computes.
    Steps with different names are counted separately, because several steps in one function start
    in any order.
    """

    def __init__(self, name: str, ranks: tuple[int, ...]) -> None:
        self._name, self._ranks = name, ranks
        self._number = 0
        self._entered: list[Wait] = []
        self._transport: Transport | None = None
        recovery.interruptible.add(self)

    def begin(self) -> Tensor:
        """Emits the logging of a run's start and returns its number: scalar, int64, from 1.

        The operation is not stateful: TensorFlow would order it after side effects of user code,
        such as `tf.print`, which wait for tensors received in the run.
        """
        with tf.device(_HOST):
            given = [not_constant(_HOST)]
            number = _private.host_call(self._begin, given, tf.int64, stateful=False)
        number.set_shape([])
        return number

    def end(self, run: Tensor, must_run: Sequence[Op], transport: Transport) -> Op:
        """Emits and returns the logging of a run's end, after the operations in `must_run`.

        `transport` must be the one that made these sends and receives; its `begin_run` and
        `end_run` are called in each run.
        """
        self._transport = transport
        with tf.device(_HOST), tf.control_dependencies([*must_run, run]):
            return _private.host_call(self._end, [run], [])

    def interrupt(self) -> None:
        """See `recovery.Interruptible`."""
        if self._transport is not None:
            self._transport.interrupt()

    def restart(self, generation: int) -> None:
        """See `recovery.Interruptible`; renumbers runs, since ranks may be in different ones."""
        self._entered.clear()
        self._number = generation << recovery.GENERATION_BITS
        if self._transport is not None:
            self._transport.restart(self._number)

    def _begin(self, _: Any) -> Any:
        recovery.begin_run()
        if self._entered:
            # Tensors in transit from that run would be taken for those of this run.
            raise CommunicationError(
                f"{self._name} was interrupted in this process in an earlier run, and cannot run "
                "again: the ranks no longer agree on where they are. Start all ranks again, from "
                "the last checkpoint."
            )
        name = f"runs of {self._name}"
        self._entered.append(waits.enter(self._name, self._ranks, name, computes=True))
        self._number += 1
        if self._transport is not None:
            self._transport.begin_run(self._number)
        return np.int64(self._number)

    def _end(self, _: Any) -> None:
        if self._transport is not None:
            self._transport.end_run()
        waits.leave(self._entered.pop())
        waits.progress()


def _handles(graph: Any) -> dict[int, int]:
    """Maps the id of each variable handle in a graph to the process that owns the variable."""
    homes = [(inner, _private.home_of_handle(outer)) for outer, inner in _private.captures(graph)]
    return {id(inner): home.process for inner, home in homes if home is not None}


def _of_others(graph: Any, layout: Layout, handles: Mapping[int, int], me: int) -> list[Op]:
    """Operations that this process leaves out: not in its part, or using variables of others."""
    mine = layout.runs[me]
    return [
        op
        for op in graph.get_operations()
        if op not in mine
        and (
            layout.home.get(op, ANYWHERE) not in (ANYWHERE, me)
            or any(handles.get(id(tensor), me) != me for tensor in op.inputs)
        )
    ]


def _handle(read: Tensor) -> Tensor:
    op = read.op
    while op.type != "ReadVariableOp":
        op = op.inputs[0].op
    return op.inputs[0]


def _sequence(schedule: Schedule) -> list[Action]:
    """All actions in order of their simulated start."""
    assert schedule.graph is not None
    start = simulate(schedule, schedule.graph).start
    return sorted(start, key=lambda action: (start[action], action))


def _description(traced: Traced, layout: Layout) -> list[str]:
    """One line per action and per transfer, which all processes must agree on."""
    lines = [
        f"partition {partition} runs {' '.join(action.text for action in order)}"
        for partition, order in enumerate(traced.schedule.orders)
    ]
    is_open = [
        action.text
        for order in traced.schedule.orders
        for action in order
        if traced.is_open(action)
    ]
    lines.append(f"calls that yield results while they compute: {' '.join(is_open)}")
    return lines + [str(transfer) for transfer in layout.transfers]


class _Keepers:
    """Determines which results stay in one process: gradients stay with their variables."""

    def __init__(
        self,
        gradients: Sequence[tuple[Any, Any]],
        owner: Mapping[Op, int],
        home_of: Mapping[int, int],
    ) -> None:
        self._owner, self._home_of = owner, home_of
        self._variable_of: dict[int, Any] = {}
        self._sparse: set[int] = set()
        for variable, gradient in gradients:
            parts = [gradient]
            if isinstance(gradient, tf.IndexedSlices):
                parts = [gradient.values, gradient.indices, gradient.dense_shape]
                self._sparse.add(id(variable))
            if id(variable) in home_of:
                self._variable_of.update({id(part): variable for part in parts})

    def of(self, tensor: Tensor) -> OwnedBy | None:
        """The process that alone keeps a result; None if all processes get it."""
        found: dict[int, Any] = {}
        seen: set[Op] = set()
        stack = [tensor]
        while stack:
            current = stack.pop()
            variable = self._variable_of.get(id(current))
            if variable is not None:
                found[id(variable)] = variable
            elif current.op not in self._owner and current.op not in seen:
                seen.add(current.op)
                stack.extend(current.op.inputs)
        if len(found) != 1:
            return None
        ((key, variable),) = found.items()
        if not self._looks_like(tensor, key, variable):
            return None
        return OwnedBy(self._home_of[key], tuple(tf_variable(variable).shape))

    def _looks_like(self, tensor: Tensor, key: int, variable: Any) -> bool:
        """Whether a tensor has the shape of the variable's gradient, unlike, say, a norm of it."""
        shape = tf_variable(variable).shape
        if tensor.shape.rank is None or not shape.rank:
            return False
        if tensor.shape.as_list() == shape.as_list():
            return True
        if key not in self._sparse or not tensor.shape.rank:
            return False
        are_rows = tensor.shape[1:].as_list() == shape[1:].as_list()
        return bool(are_rows or (tensor.dtype.is_integer and tensor.shape.rank == 1))
