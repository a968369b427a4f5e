"""Warns of a plan for memory in which one partition has most of the work."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from opensmp.compiler.format import format_bytes
from opensmp.compiler.plan.cost_model import evaluate
from opensmp.compiler.plan.partitioner.partitioner import partition_units
from opensmp.compiler.plan.plan import Plan
from opensmp.errors import PlanError

_logger = logging.getLogger("opensmp")

_POOR = 1.5
_BETTER = 0.85  # at most this share of the balance, for a change to be worth it
_FEW_SECONDS = 1e-4  # a step so short that its calls cost more than its work


def warn_of_imbalance(plan: Plan) -> None:
    """Logs one line if partitions balanced by memory differ much in time: why, and what to try."""
    settings = plan.settings
    if settings.optimize != "memory" or plan.num_partitions == 1 or plan.empty:
        return
    if settings.microbatches == 1:  # the partitions take turns, however even they are
        return
    now = plan.prediction
    if now.balance < _POOR or sum(now.stage_seconds) < _FEW_SECONDS:
        return
    graph = plan.costs
    seconds = graph.forward_seconds + graph.backward_seconds
    slowest = int(np.argmax(now.stage_seconds))
    inside = np.flatnonzero(plan.assignment == slowest)
    longest = int(inside[np.argmax(seconds[inside])])
    share = 100 * seconds[longest] / now.stage_seconds[slowest]
    _logger.warning(
        "model '%s': partition %d needs %.1f times the mean time of a partition, %.0f %% of it in "
        '\'%s\', because "optimize": "memory" balances bytes, not time. %s',
        plan.model,
        slowest,
        now.balance,
        share,
        graph.names[longest],
        _advice(plan, graph.names[longest], float(seconds[longest])),
    )


def _advice(plan: Plan, layer: str, seconds: float) -> str:
    """What to try: the other objective where it helps, otherwise other partitions."""
    now, settings = plan.prediction, replace(plan.settings, optimize="speed")
    count = plan.num_partitions
    try:
        stages = partition_units(plan.costs, count * settings.pieces_per_partition, settings)
    except PlanError:
        stages = None
    if stages is not None:
        placed = settings.partition_of_stage(stages, count)
        other = evaluate(plan.costs, placed, count, settings)
        if other.balance <= _BETTER * now.balance:
            return (
                f'"optimize": "speed" in smp.init gives {other.balance:.1f} times, and '
                f"{format_bytes(max(other.peak_bytes))} instead of "
                f"{format_bytes(max(now.peak_bytes))} in the fullest partition."
            )
    mean = sum(now.stage_seconds) / count
    if seconds > mean:
        return (
            f"No cut is better: '{layer}' alone takes {seconds / mean:.1f} times the mean. Use "
            "fewer partitions, or divide that layer."
        )
    return 'Try fewer partitions, or "pieces_per_partition": 2.'
