"""Looks for the fastest way to run a model on a cluster, among those that fit its memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from opensmp.base.message_text import did_you_mean, shown
from opensmp.compiler.cluster.cluster import Cluster
from opensmp.compiler.cluster.layout import Layout
from opensmp.compiler.format import format_bytes
from opensmp.compiler.plan.unit_graph import Machine
from opensmp.compiler.schedule.regular.orders import held_activations, is_regular, regular_order
from opensmp.compiler.simulation.finish import Loads, after_pipeline
from opensmp.compiler.simulation.run import Run
from opensmp.compiler.simulation.segments import Segments, segments_of
from opensmp.compiler.simulation.simulate import (
    delays_of,
    home_of,
    machine_for,
    memory_of,
    seconds_of,
    simulate_transformer,
)
from opensmp.compiler.simulation.step import SimulatedStep
from opensmp.compiler.simulation.timing import active_in
from opensmp.compiler.simulation.transformer import Transformer
from opensmp.config.offload import NONE, RESIDUALS
from opensmp.config.pipelines import PIPELINES
from opensmp.config.recompute import LEVELS
from opensmp.errors import PlanError

SEARCHED = tuple(name for name in PIPELINES if name != "auto")
"""Schedules that are tried: all that can be arrays."""

_PIECES = (1, 2, 4)
_MOST_EXAMPLES = 16  # of a microbatch
_MOST_PASSES = 12_000_000  # of all simulations, which are some seconds


class _Candidate(NamedTuple):
    """A run, and the least time that its step can take."""

    seconds: float
    number: int
    run: Run


def search(
    model: Transformer,
    cluster: Cluster,
    batch: int,
    *,
    pipelines: Sequence[str] = SEARCHED,
    recompute: Sequence[str] = LEVELS,
    offload: bool = False,
    shard_optimizer_state: bool = True,
    tensor_parallel: int = 1,
    most: int = 10,
) -> tuple[SimulatedStep, ...]:
    """Returns the fastest ways to run a model that fit, the fastest first.

    It tries numbers of partitions, replicas, microbatches and pieces, schedules, levels of
    recomputation, and both placements. Each candidate has a least time, which its passes and the
    first way through the pipeline need; candidates are simulated by ascending least times, until no
    other one can be among the best. So the first result is the fastest of all candidates, unless
    the search has used up its effort, which its results then do not say: it is chosen so large that
    clusters of thousands of devices do not need it.

    Args:
        model: The model.
        cluster: The devices, all of which are used if the batch can be divided so.
        batch: Examples of a step.
        pipelines: Schedules to try, by name.
        recompute: Levels of recomputation to try.
        offload: Whether to offload residuals.
        shard_optimizer_state: Whether replicas share the optimizer's state.
        tensor_parallel: As `Run.tensor_parallel`: only to describe other systems.
        most: Number of results, >= 1.

    Raises:
        PlanError: If nothing fits; the message says what comes closest.

    Example:
        ```python
        best = search(MODELS["llama3-405b"], smp.Cluster(512, 8, "h100"), batch=2048)[0]
        ```
    """
    _check(pipelines, most)
    machine = machine_for(cluster, model.precision)
    costs = _Costs(model, cluster, machine, batch)
    limit = machine.memory_bytes
    candidates: list[_Candidate] = []
    closest: tuple[float, str] = (np.inf, "")
    options = {"offload": offload, "tensor_parallel": tensor_parallel}
    for run in _runs(model, cluster, batch, pipelines, recompute, options):
        if shard_optimizer_state and run.replicas > 1:
            run = replace(run, shard_optimizer_state=True)
        memory = costs.least_bytes(run)
        if limit is not None and memory > limit:
            closest = min(closest, (memory, str(run)))
            continue
        candidates.append(_Candidate(costs.least_seconds(run), len(candidates), run))
    found: list[SimulatedStep] = []
    effort = 0
    for candidate in sorted(candidates):
        run = candidate.run
        if len(found) >= most and candidate.seconds >= found[most - 1].seconds:
            break
        effort += 3 * run.num_segments * run.microbatches
        if effort > _MOST_PASSES and found:
            break
        memory = costs.bytes(run)
        if limit is not None and memory > limit:
            closest = min(closest, (memory, str(run)))
            continue
        found = _with(found, simulate_transformer(model, cluster, run, batch))
    if not found:
        raise PlanError(_told(model, cluster, batch, limit, closest))
    return tuple(found[:most])


def _with(found: list[SimulatedStep], step: SimulatedStep) -> list[SimulatedStep]:
    """Returns the steps and another one by time; of those that differ in placement, the best."""
    best: dict[Run, SimulatedStep] = {}
    for each in sorted([*found, step], key=lambda step: (step.seconds, step.peak_bytes)):
        best.setdefault(replace(each.run, placement_strategy="cluster"), each)
    return list(best.values())


def _check(pipelines: Sequence[str], most: int) -> None:
    for name in pipelines:
        if name not in SEARCHED:
            near = did_you_mean(name, SEARCHED)
            raise PlanError(
                f"Search: the schedule {shown(name)} cannot be searched; choose among "
                f"{', '.join(SEARCHED)}{'; ' + near if near else '.'}"
            )
    if most < 1:
        raise PlanError(f"Search: most is an integer >= 1; received {shown(most)}.")


def _told(
    model: Transformer,
    cluster: Cluster,
    batch: int,
    limit: int | None,
    closest: tuple[float, str],
) -> str:
    if not closest[1]:
        return (
            f"Search: no number of replicas and microbatches divides the batch of {batch} for "
            f"{cluster.num_devices} devices; choose a batch with more divisors."
        )
    assert limit is not None
    return (
        f"Search: nothing was found that fits {format_bytes(limit)} per device. The closest, "
        f"{closest[1]}, needs {format_bytes(closest[0])}. More devices, or such with more memory, "
        f"would help{'' if model.sequence < 2 else ', or shorter sequences'}."
    )


def _runs(
    model: Transformer,
    cluster: Cluster,
    batch: int,
    pipelines: Sequence[str],
    recompute: Sequence[str],
    options: dict[str, int],
) -> Iterator[Run]:
    width = options["tensor_parallel"]
    divisors = [d for d in range(1, batch + 1) if batch % d == 0] if batch < 10**7 else []
    for partitions in _partition_counts(model, cluster, width):
        room = cluster.num_devices // (partitions * width)
        replicas = max((d for d in divisors if d <= room), default=0)
        if not replicas:
            continue
        own = batch // replicas
        sizes = [d for d in divisors if own % d == 0 and d <= _MOST_EXAMPLES]
        placements = ("cluster", "spread") if replicas > 1 < cluster.nodes else ("cluster",)
        for name, pieces in _shapes(model, partitions, pipelines):
            for examples in sizes:
                microbatches = own // examples
                if not is_regular(name, pieces, partitions, microbatches):
                    continue
                for level in recompute:
                    for placement in placements:
                        yield Run(
                            partitions=partitions,
                            replicas=replicas,
                            microbatches=microbatches,
                            pipeline=name,
                            pieces=pieces,
                            recompute=level,
                            placement_strategy=placement,
                            offload=RESIDUALS if options["offload"] else NONE,
                            tensor_parallel=width,
                        )


def _partition_counts(model: Transformer, cluster: Cluster, width: int) -> list[int]:
    """Numbers of partitions: the fewest for each size of the largest, and those that fill nodes."""
    most = min(model.layers, cluster.num_devices // width)
    fewest = {-(-model.layers // size) for size in range(1, model.layers + 1)}
    filling = {n for n in range(1, most + 1) if cluster.num_devices % (n * width) == 0}
    return sorted(n for n in fewest | filling if n <= most)


def _shapes(
    model: Transformer, partitions: int, pipelines: Sequence[str]
) -> Iterator[tuple[str, int]]:
    """Schedules with their pieces; with one partition all are the same."""
    for name in pipelines if partitions > 1 else ["simple"]:
        wanted = PIPELINES[name].pieces
        for pieces in _PIECES if wanted is None else (wanted,):
            is_other = pieces > 1 or name != "breadth_first"
            fits = partitions * pieces <= model.layers + 1
            if fits and is_other and is_regular(name, pieces, partitions, partitions):
                yield name, pieces


class _Costs:
    """Least times and memory of runs, with what several of them share."""

    def __init__(self, model: Transformer, cluster: Cluster, machine: Machine, batch: int) -> None:
        self._cluster, self._machine, self._batch = cluster, machine, batch
        self._segments = lru_cache(maxsize=None)(
            lambda count, examples, width: segments_of(
                model, count, examples, machine, Layout(cluster, 1, 1, width).sharers
            )
        )
        self._layout = lru_cache(maxsize=None)(
            lambda partitions, replicas, width, strategy: Layout(
                cluster, partitions, replicas, width, strategy
            )
        )
        self._parts = lru_cache(maxsize=None)(self._parts_of)

    def _of(self, run: Run) -> tuple[Segments, Layout]:
        examples = self._batch // (run.replicas * run.microbatches)
        return (
            self._segments(run.num_segments, examples, run.tensor_parallel),
            self._layout(run.partitions, run.replicas, run.tensor_parallel, run.placement_strategy),
        )

    def least_bytes(self, run: Run) -> float:
        """Returns what the fullest device needs at least."""
        segments, _ = self._of(run)
        row = PIPELINES[str(run.pipeline)]
        least = 1
        if row.holds_all:
            least = run.microbatches
        held = np.full(run.num_segments, least)
        home = home_of(run)
        # The first device holds as many as the schedule is made for, others may hold fewer.
        most = run.partitions if row.held is None else max(1, row.held(run.partitions) - 1)
        held[home == 0] = max(least, min(run.microbatches, most) if run.pieces == 1 else least)
        return float(memory_of(run, segments, held).max())

    def bytes(self, run: Run) -> float:
        """Returns what the fullest device needs."""
        segments, layout = self._of(run)
        held = np.zeros(run.num_segments, dtype=np.int64)
        active = active_in(run, layout.is_on_several_machines)
        order = regular_order(
            str(run.pipeline), run.partitions, run.microbatches, run.pieces, True, active
        )
        held[order.segments_of_pieces] = held_activations(order)
        return float(memory_of(run, segments, held).max())

    def least_seconds(self, run: Run) -> float:
        """Returns a bound below the time of a step.

        A device runs all its passes, after the first microbatch has come through the segments
        before it; unless weight gradients wait, the last one then goes back through these.
        """
        row = PIPELINES[str(run.pipeline)]
        # What is cached depends on the places of the pieces, but not on the order.
        like = "zb_v" if row.placement == "v" else "interleaved"
        each, before, back, after = self._parts(replace(run, pipeline=like))
        ends = run.microbatches * each + before + (0.0 if row.defers_weights else back)
        return float((ends + after).max())

    def _parts_of(
        self, run: Run
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        segments, layout = self._of(run)
        forward, backward, weights = seconds_of(run, segments)
        delays = delays_of(run, segments, layout)
        home = home_of(run)
        each = np.zeros(run.partitions)
        np.add.at(each, home, forward + backward + weights)
        first = np.array([int(np.flatnonzero(home == p)[0]) for p in range(run.partitions)])
        coming = np.append(0.0, np.cumsum(forward + np.append(delays[0, 1:], 0.0)))
        going = np.append(0.0, np.cumsum(backward + delays[1]))
        back = np.maximum(0.0, going[first] - weights[first])
        zeros = np.zeros(len(home))
        kinds = [segments.parameter_bytes, segments.slot_bytes, backward + weights, segments.layers]
        kinds += [zeros] * 7  # nothing of which comes after the pipeline
        of_partition = [np.bincount(home, part, run.partitions).astype(float) for part in kinds]
        loads = Loads._make(of_partition)
        after = after_pipeline(run, layout, self._machine, loads)
        return each, coming[first], back, after[0] + after[1]
