"""Sends values between processes in a function that all of them have traced.

See `remote_values` for how such values are recorded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Op, Tensor
from opensmp.distributed.collectives.consistency import agree
from opensmp.distributed.collectives.objects import allgather_objects
from opensmp.distributed.transport.transfer import Transfer
from opensmp.distributed.world import MP_GROUP, World, current
from opensmp.errors import ElsewhereError, StepError
from opensmp.execution.emission.task_graph import live_operations
from opensmp.execution.multi_process.derived_values import Derived, Digest
from opensmp.execution.multi_process.distribute import RunLog, transport_of
from opensmp.execution.multi_process.liveness import used_inputs
from opensmp.execution.multi_process.remote_values import Fetches, Known


class Wanted(NamedTuple):
    """A value that a process needs from another one.

    Attributes:
        digest: Identifies the computation of the value; the same in all processes.
        process: Position of the sender in the replica.
        shape: Its static shape.
        dtype: Name of its dtype.
        name: Names of the values it is computed from, for messages.
    """

    digest: Digest
    process: int
    shape: tuple[int | None, ...]
    dtype: str
    name: str

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} {list(self.shape)}"


class _Choice(NamedTuple):
    """Values to receive: `smaller` if the other process computes all of them, else `values`."""

    values: tuple[Wanted, ...]
    smaller: tuple[Wanted, ...]


class _Report(NamedTuple):
    """The part of a process' trace that it sends to the others."""

    choices: list[_Choice]
    has: frozenset[Digest]


def fetch(fetches: Fetches, must_run: Sequence[Op]) -> None:
    """Replaces the placeholders that a function reads by received values."""
    world = current()
    me = world.rank_in(MP_GROUP)
    graph = fetches.graph
    live = _live(fetches, must_run, me)
    read = [one for one in fetches.known.values() if one.process != me and id(one.tensor) in live]
    if not fetches.is_step:
        if read:
            raise ElsewhereError(_not_in_a_step(graph, read))
        return
    derived = Derived.of(graph, fetches.known.values(), live, me)
    tensors: dict[Digest, Tensor] = {}

    def wanted(several: Sequence[Tensor]) -> tuple[Wanted, ...]:
        tensors.update({derived.digest(tensor): tensor for tensor in several})
        return tuple(_wanted(tensor, derived) for tensor in several)

    choices = [_Choice(wanted(c.values), wanted(c.smaller)) for c in derived.cuts(read)]
    with tf.init_scope():
        reports: list[_Report] = allgather_objects(
            _Report(choices, derived.own()), world.mp_group, f"what {graph.name} reads"
        )
    chosen = [_chosen(report, reports) for report in reports]
    _check(chosen, reports, graph.name, world)
    transfers = [
        _transfer(one, target, me, tensors, derived)
        for target, needed in enumerate(chosen)
        for one in needed
    ]
    if transfers:
        lines = [
            f"{one} from {one.process} to {target}"
            for target, needed in enumerate(chosen)
            for one in needed
        ]
        with graph.as_default(), tf.control_dependencies(None):
            _emit(transfers, lines, world, graph)


def _wanted(tensor: Tensor, derived: Derived) -> Wanted:
    return Wanted(
        derived.digest(tensor),
        derived.process(tensor),
        tuple(tensor.shape),
        tensor.dtype.name,
        derived.name(tensor),
    )


def _chosen(report: _Report, reports: Sequence[_Report]) -> list[Wanted]:
    """The values that a process receives; all processes compute the same choice."""
    found: dict[Digest, Wanted] = {}
    for choice in report.choices:
        is_there = all(one.digest in reports[one.process].has for one in choice.smaller)
        found.update({one.digest: one for one in (choice.smaller if is_there else choice.values)})
    return list(found.values())


def _live(fetches: Fetches, must_run: Sequence[Op], me: int) -> dict[int, Tensor]:
    """Maps ids to the tensors that the operations run by this process read."""
    graph = fetches.graph
    roots = [t.op for t in graph.outputs] + list(must_run) + list(graph.control_outputs)
    roots += [one.tensor.op for one in fetches.known.values() if one.process == me]
    live: dict[int, Tensor] = {id(t): t for t in graph.outputs}
    for op in live_operations(roots):
        live.update({id(t): t for t in used_inputs(op)})
    return live


def _transfer(
    one: Wanted, target: int, me: int, wanted: Mapping[Digest, Tensor], derived: Derived
) -> Transfer:
    spec = tf.TensorSpec(one.shape, one.dtype)
    if me == target:
        tensor = wanted[one.digest]
        return Transfer(tensor.op, tensor, one.process, target, (tensor,))
    if me != one.process:
        return Transfer(None, spec, one.process, target)
    tensor = derived.tensor(one.digest)
    if tensor.shape.as_list() != list(one.shape):  # known to a different degree here
        with tensor.graph.as_default(), tf.control_dependencies(None), tf.device(tensor.device):
            tensor = tf.raw_ops.PlaceholderWithDefault(input=tensor, shape=spec.shape)
    return Transfer(tensor.op, tensor, one.process, target)


def _emit(transfers: Sequence[Transfer], lines: Sequence[str], world: World, graph: Any) -> None:
    name = f"the values that {graph.name} reads of other ranks"
    number = agree(world.mp_group, name, lines)
    runs = RunLog(name, world.mp_group)
    run = runs.begin()
    transport = transport_of(transfers, world, number, run)
    me = world.rank_in(MP_GROUP)
    waiting: list[Op] = []
    for index, transfer in enumerate(transfers):
        if transfer.source == me:
            waiting.append(transport.send(transfer, index).op)
        elif transfer.target == me:
            value = transport.receive(transfer, index).tensor
            waiting.append(value.op)
            _replace(transfer.tensor, value, graph)
    end = runs.end(run, waiting, transport)
    graph.control_outputs.append(end)


def _replace(tensor: Tensor, value: Tensor, graph: Any) -> None:
    for consumer in tensor.consumers():
        for index, read in enumerate(consumer.inputs):
            if read is tensor:
                _private.replace_input(consumer, index, value)
    graph.outputs[:] = [value if output is tensor else output for output in graph.outputs]


def _check(
    chosen: Sequence[Sequence[Wanted]], reports: Sequence[_Report], name: str, world: World
) -> None:
    for target, needed in enumerate(chosen):
        for one in needed:
            if one.digest not in reports[one.process].has:
                raise StepError(
                    f"Rank {world.mp_group[target]} needs a value of rank "
                    f"{world.mp_group[one.process]} in {name}, which has not computed it. "
                    f"{one.name}. Expected: all ranks trace the same program. Look for code that "
                    "depends on the rank, or that reads variables a different number of times."
                )


def _not_in_a_step(graph: Any, read: Sequence[Known]) -> str:
    names = ", ".join(dict.fromkeys(one.name for one in read[:3]))
    return (
        f"{names}: read in the tf.function '{graph.name}' in a process that does not own it. The "
        "value can be sent where all processes run the function, which is known of a train_step "
        "and its like, and of a tf.function that calls an smp.step function or the model. "
        "Elsewhere expected: variables that lie here, `smp.local_variables(model)`, or "
        "`model.get_weights()` in all processes, outside of the function."
    )
