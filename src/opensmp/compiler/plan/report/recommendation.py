"""Recommends a number of partitions, a number of microbatches and a schedule for a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from opensmp.base.message_text import counted
from opensmp.compiler.format import format_bytes
from opensmp.compiler.plan.cost_model import Prediction, evaluate
from opensmp.compiler.plan.partitioner.partitioner import partition_units
from opensmp.compiler.plan.report.simulated_step import simulate_step
from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.plan.unit_graph import CoarseGraph, Machine
from opensmp.compiler.schedule.simulate import Simulation
from opensmp.config.pipelines import DEFAULT_PIPELINE, PIPELINES
from opensmp.errors import PlanError

# Without those that differ from `simple` only with several pieces a partition.
_WITH_KNOWN_COSTS = tuple(
    name for name, row in PIPELINES.items() if not row.defers_weights and name != "breadth_first"
)

_PIECES = 2


@dataclass(frozen=True)
class Candidate:
    """One configuration and its predicted costs.

    Attributes:
        num_partitions: Number of partitions.
        settings: Microbatches, schedule and further settings.
        assignment: Partition of each unit, int64.
        prediction: Times and memory.
        fits: Whether every partition fits the device's memory.
        simulation: The simulated step; None if the formula of the cost model is all there is.
    """

    num_partitions: int
    settings: PlanSettings
    assignment: NDArray[np.int64]
    prediction: Prediction
    fits: bool
    simulation: Simulation | None = None

    @property
    def step_seconds(self) -> float:
        """Time of a step: of the simulated schedule, if it was simulated."""
        found = self.simulation
        return self.prediction.step_seconds if found is None else found.makespan_seconds

    @property
    def bubble(self) -> float:
        """Idle share of all devices' time, likewise."""
        return self.prediction.bubble if self.simulation is None else self.simulation.bubble

    @property
    def peak_bytes(self) -> int:
        """Memory of the fullest partition."""
        return max(self.prediction.peak_bytes)


def recommend(
    graph_for: Callable[[int], CoarseGraph],
    batch: int,
    machine: Machine,
    *,
    partitions: Sequence[int],
    microbatches: Sequence[int] = (),
    pipelines: Sequence[str] = _WITH_KNOWN_COSTS,
    optimize: str = "speed",
    contiguous: bool = True,
    least_rows: int = 1,
    simulated: int = 0,
) -> tuple[Candidate, ...]:
    """Plans a model for many configurations and ranks them.

    Configurations that fit come first, by step time, then peak memory, partitions and microbatches.
    Those that do not fit follow, with the smallest peak memory first, which shows how much is
    missing.

    Args:
        graph_for: Returns the model's units for a number of microbatches; called once each.
        batch: Examples per step; numbers of microbatches must divide it.
        machine: The devices; `memory_bytes` is the memory limit of each.
        partitions: Numbers of partitions to try, up to the number of devices.
        microbatches: Numbers of microbatches to try; all divisors up to 64 by default.
        pipelines: Schedules to try. Those that defer weight gradients are not included by default:
            their savings and the residuals of their split backward passes depend on more than the
            cost model knows.
        optimize: What each plan balances, `"memory"` or `"speed"`.
        contiguous: Whether partitions must be connected.
        least_rows: Fewest rows of a microbatch, unless it is the whole batch.
        simulated: For how many of the best numbers of partitions and microbatches to simulate the
            schedule, also of `"zero_bubble"` and of two pieces per partition, of which the formula
            knows nothing.

    Returns:
        All candidates, the best one first.
    """
    counts = microbatches or [m for m in range(1, min(batch, 64) + 1) if batch % m == 0]
    counts = [m for m in counts if m >= 1 and batch % m == 0]
    counts = [m for m in counts if m == 1 or batch // m >= least_rows]
    if not counts:
        raise PlanError(
            f"recommend: none of the numbers of microbatches {list(microbatches)} divides the "
            f"batch of {batch}; the examples of a step are divided equally."
        )
    cached = lru_cache(maxsize=None)(graph_for)
    candidates = []
    for count in counts:
        for num_partitions in sorted(set(partitions)):
            for pipeline in pipelines:
                settings = PlanSettings(
                    microbatches=count,
                    pipeline=pipeline,
                    optimize=optimize,
                    contiguous=contiguous,
                    machine=machine,
                )
                candidates.append(_candidate(cached(count), num_partitions, settings))
    distinct = list(_distinct(candidates))
    for pair in _best_pairs(distinct, simulated):
        graph, (num_partitions, count) = cached(pair[1]), pair
        alike = [c for c in distinct if (c.num_partitions, c.settings.microbatches) == pair]
        distinct = [c for c in distinct if c not in alike]
        alike += _variants(graph, num_partitions, alike[0].settings)
        distinct += [_simulated(graph, each) for each in alike]
    return tuple(sorted(distinct, key=_rank))


def _best_pairs(candidates: Sequence[Candidate], most: int) -> list[tuple[int, int]]:
    """Returns the numbers of partitions and microbatches of the best pipelines that fit."""
    pairs = dict.fromkeys(
        (c.num_partitions, c.settings.microbatches)
        for c in sorted(candidates, key=_rank)
        if c.fits and c.num_partitions > 1 and c.settings.microbatches > 1
    )
    return list(pairs)[:most]


def _variants(graph: CoarseGraph, num_partitions: int, settings: PlanSettings) -> list[Candidate]:
    """Returns what the formula cannot tell from the others: deferred weights, and more pieces."""
    wanted = [replace(settings, pipeline="zero_bubble")]
    if _PIECES * num_partitions <= len(graph):
        wanted.append(replace(settings, pipeline=DEFAULT_PIPELINE, pieces=_PIECES))
    made = [_candidate(graph, num_partitions, each) for each in wanted]
    return [each for each in made if each.fits]


def _simulated(graph: CoarseGraph, candidate: Candidate) -> Candidate:
    found = simulate_step(graph, candidate.assignment, candidate.num_partitions, candidate.settings)
    return replace(candidate, simulation=found)


def _candidate(graph: CoarseGraph, num_partitions: int, settings: PlanSettings) -> Candidate:
    """Plans one configuration; without a plan that fits, takes the one with the smallest peak."""
    fits = True
    pieces = settings.pieces_per_partition
    try:
        assignment = partition_units(graph, num_partitions * pieces, _of_one_piece(settings))
    except PlanError:
        fits = False
        unlimited = replace(settings.machine, memory_bytes=None)
        # Minimize memory regardless of `optimize`, to find the smallest shortfall.
        closest = replace(settings, optimize="memory", machine=unlimited)
        assignment = partition_units(graph, num_partitions * pieces, closest)
    if pieces > 1:
        assignment = settings.partition_of_stage(assignment, num_partitions)
    prediction = evaluate(
        graph, assignment, num_partitions, settings, monotone=pieces == 1, by_schedule=True
    )
    if machine_limit := settings.machine.memory_bytes:
        fits = fits and max(prediction.peak_bytes) <= machine_limit
    return Candidate(num_partitions, settings, assignment, prediction, fits)


def _of_one_piece(settings: PlanSettings) -> PlanSettings:
    """Returns the settings with the share of a device's memory that one of its pieces may take."""
    limit, pieces = settings.machine.memory_bytes, settings.pieces_per_partition
    if limit is None or pieces == 1:
        return settings
    return replace(settings, machine=replace(settings.machine, memory_bytes=limit // pieces))


def _distinct(candidates: Iterable[Candidate]) -> Iterable[Candidate]:
    """Drops duplicates.

    A plan with empty partitions equals that for fewer partitions, and schedules do not differ with
    one microbatch or one partition.
    """
    seen = set()
    for candidate in candidates:
        if candidate.prediction.empty_partitions:
            continue
        alike = candidate.num_partitions == 1 or candidate.settings.microbatches == 1
        key = (
            candidate.num_partitions,
            candidate.settings.microbatches,
            "" if alike else candidate.settings.pipeline,
        )
        if key not in seen:
            seen.add(key)
            yield candidate


def _rank(candidate: Candidate) -> tuple[float, ...]:
    seconds, peak = candidate.step_seconds, candidate.peak_bytes
    order = (seconds, peak) if candidate.fits else (peak, seconds)
    return (
        not candidate.fits,
        *order,
        candidate.num_partitions,
        candidate.settings.microbatches,
    )


def shortfall(candidates: Sequence[Candidate], machine: Machine) -> str:
    """Returns why nothing fits and what would help; empty if something fits."""
    if not candidates or candidates[0].fits or machine.memory_bytes is None:
        return ""
    closest = candidates[0]
    missing = closest.peak_bytes - machine.memory_bytes
    return (
        f"No configuration fits {format_bytes(machine.memory_bytes)} per device. The closest, "
        f"{counted(closest.num_partitions, 'partition')} and "
        f"{counted(closest.settings.microbatches, 'microbatch')}, "
        f"needs {format_bytes(closest.peak_bytes)}, {format_bytes(missing)} too much. More "
        "partitions, a smaller batch or larger devices would help."
    )
