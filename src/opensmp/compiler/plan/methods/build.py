"""Builds plans of traced graphs and checks that they are complete."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

from opensmp.base.message_text import counted
from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.plan.unit_graph import CoarseGraph
from opensmp.compiler.trace.layer_calls import layer_calls, operation_labels
from opensmp.compiler.trace.trace import TracedGraph
from opensmp.errors import PlanError

_logger = logging.getLogger("opensmp")
_NUM_NAMED = 5


def make_plan(
    traced: TracedGraph,
    num_partitions: int,
    partition_of: Mapping[str, int],
    *,
    groups: Iterable[tuple[str, Sequence[str]]] | None = None,
    settings: PlanSettings | None = None,
    source: str = "",
    graph: CoarseGraph | None = None,
    make_graph: Callable[[], CoarseGraph] | None = None,
) -> Plan:
    """Builds the plan of a traced graph and checks that it covers every operation.

    `groups` are pairs (name, operations) of pieces that a user of the plan file may move between
    partitions; by default the operations of each layer call by partition. For the rest see `Plan`.
    """
    _refuse_gaps(traced, num_partitions, partition_of, source)
    if groups is None:
        groups = _by_partition(traced, partition_of)
    return Plan(
        model=traced.name,
        num_partitions=num_partitions,
        partition_of=partition_of,
        calls=layer_calls(traced, groups),
        settings=settings or PlanSettings(),
        source=source,
        graph=graph,
        make_graph=make_graph,
    )


def costs_later(traced: TracedGraph, settings: PlanSettings) -> Callable[[], CoarseGraph]:
    """Returns a function that computes the units and costs of a graph on demand."""

    def make_graph() -> CoarseGraph:
        # Imported lazily: running an existing plan does not need its costs.
        from opensmp.compiler.plan.coarsening.coarsen import coarsen

        return coarsen(traced, settings.machine)

    return make_graph


def warn_of_empty(plan: Plan, *, is_shared: bool = False) -> None:
    """Logs which partitions of a plan are empty, and the reason."""
    if not plan.empty:
        return
    numbers = ", ".join(map(str, plan.empty))
    which = f"partition {numbers} is" if len(plan.empty) == 1 else f"partitions {numbers} are"
    if plan.source == "auto" and is_shared:
        why = "layers that it shares with an earlier model stay where they are"
    elif plan.source == "auto":
        why = (
            f"the model has only {counted(plan.num_partitions - len(plan.empty), 'piece')} "
            "that can be separated. Use fewer partitions"
        )
    elif plan.source == "manual":
        why = "no operation was made in a smp.partition context of that number"
    else:
        why = f"the plan of {plan.source} gives it nothing. Edit its 'layers'"
    _logger.warning(
        "model '%s': %s empty, so that its device only waits: %s.", plan.model, which, why
    )


def _refuse_gaps(
    traced: TracedGraph, num_partitions: int, partition_of: Mapping[str, int], source: str
) -> None:
    """Raises if an operation has no partition or one that does not exist."""
    names = [op.name for op in traced.operations if op not in traced.sources]
    missing = [name for name in names if name not in partition_of]
    outside = [
        f"{name} ({partition_of[name]})"
        for name in names
        if not 0 <= partition_of.get(name, 0) < num_partitions
    ]
    faults = []
    if missing:
        faults.append(f"{len(missing)} of {len(names)} operations have none: {_named(missing)}")
    if outside:
        faults.append(f"{len(outside)} have one that does not exist: {_named(outside)}")
    if faults:
        raise PlanError(
            f"Plan of '{traced.name}' ({source or 'unknown source'}): every operation must have "
            f"a partition from 0 to {num_partitions - 1}, but {'; '.join(faults)}."
        )


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    return ", ".join(names[:_NUM_NAMED]) + more


def _by_partition(
    traced: TracedGraph, partition_of: Mapping[str, int]
) -> list[tuple[str, list[str]]]:
    """Groups operations by layer call and partition; a group is named after its first operation."""
    _, label_of = operation_labels(traced)
    groups: dict[tuple[str, int], list[str]] = {}
    for name, label in label_of.items():
        groups.setdefault((label, partition_of[name]), []).append(name)
    return [(names[0].rsplit("/", 1)[-1], names) for names in groups.values()]
