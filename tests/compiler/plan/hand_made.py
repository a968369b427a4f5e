"""Plans of graphs made by hand: no TensorFlow in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.plan.unit_graph import CoarseGraph, CutTensor, Machine, SharedVariable
from opensmp.compiler.trace.layer_calls import MODEL, LayerCall, Piece

MACHINE = Machine(transfer_seconds=0.5, transfer_bytes_per_second=100.0)


def chain(
    num_units: int,
    *,
    layers: Sequence[str] | None = None,
    tensors: Sequence[CutTensor] | None = None,
    shared: Sequence[SharedVariable] = (),
    forward: Sequence[float] | None = None,
) -> CoarseGraph:
    """Units in a row: 1 s forward, 2 s backward, 10 B parameters, 100 B tensors.

    A unit has two operations, `<layer>/MatMul` and `<layer>/Add`.
    """
    names = tuple(layers or (f"dense_{i}" for i in range(num_units)))
    seconds = np.array(forward or np.ones(num_units), dtype=np.float64)
    return CoarseGraph(
        names=names,
        forward_seconds=seconds,
        backward_seconds=2 * seconds,
        parameter_bytes=np.full(num_units, 10),
        state_bytes=np.full(num_units, 20),
        residual_bytes=np.full(num_units, 5),
        tensors=tuple(
            tensors
            if tensors is not None
            else (CutTensor(i, (i + 1,), 100, 100, f"t{i}") for i in range(num_units - 1))
        ),
        shared=tuple(shared),
        operations=tuple((f"{name}/MatMul", f"{name}/Add") for name in names),
        layers=names,
        forward_flops=1e9 * seconds,
        backward_flops=2e9 * seconds,
    )


def calls_of(graph: CoarseGraph) -> tuple[LayerCall, ...]:
    """One layer call per unit."""
    inner = (
        LayerCall(name, (Piece(name, operations),))
        for name, operations in zip(graph.names, graph.operations, strict=True)
    )
    return (LayerCall(MODEL, ()), *inner)


def plan_of(
    graph: CoarseGraph,
    assignment: Sequence[int],
    num_partitions: int,
    *,
    memory_bytes: int | None = None,
    **settings: Any,
) -> Plan:
    """The plan that puts unit i into partition `assignment[i]`."""
    machine = Machine(
        transfer_seconds=MACHINE.transfer_seconds,
        transfer_bytes_per_second=MACHINE.transfer_bytes_per_second,
        memory_bytes=memory_bytes,
    )
    partition_of = {
        name: partition
        for operations, partition in zip(graph.operations, assignment, strict=True)
        for name in operations
    }
    return Plan(
        "net",
        num_partitions,
        partition_of,
        calls_of(graph),
        PlanSettings(**{"microbatches": 4, "machine": machine, **settings}),
        "auto",
        graph,
    )
