"""Automatic plans: the partitioner cuts the coarsened graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from opensmp.compiler.plan.coarsening.coarsen import coarsen
from opensmp.compiler.plan.methods.build import make_plan
from opensmp.compiler.plan.methods.pinned import kept_units, partition_around, tell_of_kept
from opensmp.compiler.plan.partitioner.partitioner import partition_units
from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.plan.unit_graph import CoarseGraph
from opensmp.compiler.trace.trace import TracedGraph
from opensmp.errors import PlanError


def auto_plan(
    traced: TracedGraph,
    num_partitions: int,
    settings: PlanSettings | None = None,
    homes: Mapping[int, int] | None = None,
) -> Plan:
    """Cuts a model by its predicted costs.

    Raises:
        PlanError: If no plan fits the memory of the devices.
    """
    settings = settings or PlanSettings()
    graph = coarsen(traced, settings.machine)
    return plan_units(traced, graph, num_partitions, settings, homes)


def plan_units(
    traced: TracedGraph,
    graph: CoarseGraph,
    num_partitions: int,
    settings: PlanSettings,
    homes: Mapping[int, int] | None = None,
) -> Plan:
    """Does the same as `auto_plan` for a model whose units and costs are known."""
    stages = _stages(graph, num_partitions * settings.pieces_per_partition, settings)
    assignment = free = settings.partition_of_stage(stages, num_partitions)
    kept = kept_units(traced, graph, homes or {})
    if kept:
        assignment = partition_around(graph, kept, num_partitions, settings, free)
    groups = _whole_groups(traced, graph)
    partition_of = {
        name: int(partition)
        for names, partition in zip(groups, assignment, strict=True)
        for name in names
    }
    plan = make_plan(
        traced,
        num_partitions,
        partition_of,
        groups=zip(graph.names, groups, strict=True),
        settings=settings,
        source="auto",
        graph=graph,
    )
    tell_of_kept(plan, kept, free)
    return plan


def _stages(graph: CoarseGraph, count: int, settings: PlanSettings) -> NDArray[np.int64]:
    """Returns the stage of each unit; stages are numbered in model order, several per device."""
    machine, pieces = settings.machine, settings.pieces_per_partition
    if machine.memory_bytes is not None:
        machine = replace(machine, memory_bytes=machine.memory_bytes // pieces)
    try:
        return partition_units(graph, count, replace(settings, machine=machine))
    except PlanError as error:
        if pieces == 1:
            raise
        raise PlanError(
            f"{error} Here a partition is one of the {pieces} pieces that each device "
            f"holds (pieces_per_partition={pieces}), and may take its share of the memory."
        ) from None


def _whole_groups(traced: TracedGraph, graph: CoarseGraph) -> list[list[str]]:
    """Returns the operations of each unit, including those that belong to no unit.

    Replicated operations belong to no unit. They are added to the first unit that reads them, so
    that every operation has a partition.
    """
    unit_of = {name: u for u, names in enumerate(graph.operations) for name in names}
    consumer: dict[str, int] = {}
    for op in reversed(traced.operations):
        unit = unit_of.get(op.name, consumer.get(op.name))
        if unit is not None:
            for producer in (*(tensor.op for tensor in op.inputs), *op.control_inputs):
                consumer[producer.name] = min(unit, consumer.get(producer.name, unit))
    groups: list[list[str]] = [[] for _ in graph.operations]
    unit = 0
    for op in traced.operations:
        if op not in traced.sources and groups:
            # An operation without readers joins the unit of the operation before it.
            unit = unit_of.get(op.name, consumer.get(op.name, unit))
            groups[unit].append(op.name)
    return groups
