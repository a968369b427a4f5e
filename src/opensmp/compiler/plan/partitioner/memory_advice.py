"""The error message if no plan fits the memory: the shortage and possible remedies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from opensmp.compiler.format import shortened
from opensmp.compiler.plan.cost_model import evaluate, slots_of
from opensmp.compiler.plan.partitioner.baselines import evenly_full_runs, simple_runs
from opensmp.compiler.plan.partitioner.interval_cuts import cut_order
from opensmp.compiler.plan.partitioner.problem import Score, price
from opensmp.compiler.plan.partitioner.topological_orders import topological_orders
from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.plan.unit_graph import CoarseGraph
from opensmp.config.offload import ALL, NONE, OPTIMIZER, RESIDUALS
from opensmp.config.recompute import LEVELS

_NUM_ORDERS = 3
_MORE_PARTITIONS = (1.25, 1.5, 2, 3, 4, 6, 8)
_SMALLER_MICROBATCHES = (2, 4, 8, 16, 32)
_REPLICAS = (2, 4, 8, 64)


def describe_shortage(
    graph: CoarseGraph,
    assignment: NDArray[np.int64],
    num_partitions: int,
    settings: PlanSettings,
) -> str:
    """Describes by how much the best plan found exceeds the memory, and which remedies work."""
    cap = settings.machine.memory_bytes
    assert cap is not None
    peaks = evaluate(graph, assignment, num_partitions, settings, by_schedule=True).peak_bytes
    fullest = int(np.argmax(peaks))
    need = peaks[fullest]
    inside = assignment == fullest
    away = slots_of(graph.state_bytes) * settings.offloads_all_slots
    lasting = int((graph.parameter_bytes + graph.state_bytes - away)[inside].sum())
    lasting += sum(
        variable.parameter_bytes + variable.gradient_bytes
        for variable in graph.shared
        if inside[list(variable.units)].any()
    )
    held = int(settings.microbatches_held(num_partitions)[fullest])
    remedies = [*_remedies(graph, num_partitions, settings, cap), f"devices of {_size(need)}"]
    cut = "one partition" if num_partitions == 1 else f"{num_partitions} partitions"
    return (
        f"Plan: no cut into {cut} was found that fits into {_size(cap)} per device. "
        f"The best one needs {_size(need)} in partition {fullest}, {_size(need - cap)} too much: "
        f"{_size(lasting)} for variables, gradients and optimizer state, and "
        f"{_size(need - lasting)} for what {held} microbatches in flight keep and exchange. "
        f"{_largest(graph, inside, held, settings.offloads_all_slots)}"
        f"What would help: {'; or '.join(remedies)}."
    )


def _largest(graph: CoarseGraph, inside: NDArray[np.bool_], held: int, no_slots: bool) -> str:
    """Names the layer of a partition that needs most."""
    each = graph.parameter_bytes + graph.state_bytes + held * graph.residual_bytes
    each = each - slots_of(graph.state_bytes) * no_slots
    sizes: dict[str, int] = {}
    for unit in np.flatnonzero(inside).tolist():
        name = (graph.layers[unit] if graph.layers else "") or graph.names[unit]
        sizes[name] = sizes.get(name, 0) + int(each[unit])
    name = max(sizes, key=sizes.__getitem__, default="")
    return f"Most of it is for '{shortened(name, 60)}': {_size(sizes[name])}. " if sizes else ""


def _remedies(
    graph: CoarseGraph, num_partitions: int, settings: PlanSettings, cap: int
) -> Iterator[str]:
    """Yields what else could be changed; each remedy is tried before it is proposed."""

    def with_microbatches(count: int) -> int:
        smaller = _shrunk(graph, count // settings.microbatches)
        return _least_bytes(smaller, num_partitions, replace(settings, microbatches=count))

    yield _first_that_fits(
        sorted({int(np.ceil(num_partitions * factor)) for factor in _MORE_PARTITIONS}),
        cap,
        lambda count: _least_bytes(graph, count, settings),
        "{} partitions: {} per device",
        "more partitions, though not even {} are enough alone: {} per device",
    )
    yield _first_that_fits(
        [settings.microbatches * factor for factor in _SMALLER_MICROBATCHES],
        cap,
        with_microbatches,
        "a smaller microbatch: {} microbatches of the same batch, {} per device",
        "a smaller microbatch, though not even {} microbatches are enough alone: {} per device",
    )
    yield from _recomputation(graph, num_partitions, settings, cap)
    yield from _offloading(graph, num_partitions, settings, cap)
    yield from _sharding(graph, num_partitions, settings, cap)


def _recomputation(
    graph: CoarseGraph, num_partitions: int, settings: PlanSettings, cap: int
) -> Iterator[str]:
    """Yields the lowest level of recomputation with which a plan fits, or how far the last goes."""
    if settings.recompute not in LEVELS or not graph.residual_bytes.any():
        return
    for level in LEVELS[LEVELS.index(str(settings.recompute)) + 1 :]:
        needed = _least_bytes(graph, num_partitions, replace(settings, recompute=level))
        if needed <= cap or level == LEVELS[-1]:
            enough = "" if needed <= cap else ", which is not enough alone"
            yield (
                "recomputing in the backward pass what the forward pass now keeps, by "
                f"recompute={level!r}: {_size(needed)} per device{enough}"
            )
            return


def _offloading(
    graph: CoarseGraph, num_partitions: int, settings: PlanSettings, cap: int
) -> Iterator[str]:
    """Yields how far it helps to offload residuals, unless few are in flight, and slots."""
    if settings.offload not in (NONE, RESIDUALS, OPTIMIZER):
        return
    found: list[tuple[str, int, str]] = []
    held = settings.microbatches_held(num_partitions).max()

    def note(level: str, what: str) -> None:
        changed = replace(settings, offload=level)
        found.append((what, _least_bytes(graph, num_partitions, changed), level))

    everywhere = replace(settings, offload=RESIDUALS)
    helps = everywhere.microbatches_resident(num_partitions).max() < held
    if settings.offload != RESIDUALS and graph.residual_bytes.any() and helps:
        both = RESIDUALS if settings.offload == NONE else ALL
        note(both, "what the forward pass keeps elsewhere until it is needed")
    if settings.offload != OPTIMIZER and graph.state_bytes.any():
        both = OPTIMIZER if settings.offload == NONE else ALL
        note(both, "the optimizer's state elsewhere between updates")
    for what, needed, level in found:
        enough = "" if needed <= cap else ", which is not enough alone"
        yield f"moving {what}, by offload={level!r}: {_size(needed)} per device{enough}"


def _sharding(
    graph: CoarseGraph, num_partitions: int, settings: PlanSettings, cap: int
) -> Iterator[str]:
    """Yields the fewest replicas with which shards of the optimizer's state fit, or how far."""
    if not graph.state_bytes.any() or settings.offloads_all_slots:
        return
    for replicas in _REPLICAS:
        slots = slots_of(graph.state_bytes) * (replicas - 1) // replicas
        needed = _least_bytes(
            replace(graph, state_bytes=graph.state_bytes - slots), num_partitions, settings
        )
        if needed <= cap or replicas == _REPLICAS[-1]:
            enough = "" if needed <= cap else ", which is not enough alone"
            yield (
                f"{replicas} replicas that share the optimizer's state, by "
                f"shard_optimizer_state=True: {_size(needed)} per device{enough}"
            )
            return


def _least_bytes(graph: CoarseGraph, num_partitions: int, settings: PlanSettings) -> int:
    """Returns the peak of the fullest device in the best of the plans that a few orders give.

    Orders of many units are only cut at some places, which may be fewer than there are partitions.
    """
    problem = replace(price(graph, num_partitions, settings), minimise_bytes=True)
    plans = simple_runs(problem) + [
        placed
        for order in topological_orders(problem, _NUM_ORDERS)
        for placed in cut_order(problem, order, Score(0, 2**62, 0), contiguous=False)
    ]
    # Those that hold fewer microbatches than are in flight need less than the problem counts.
    best = sorted(plans, key=problem.score)[:_NUM_ORDERS]
    best.append(evenly_full_runs(graph, num_partitions, settings))
    return min(
        max(evaluate(graph, p, num_partitions, settings, by_schedule=True).peak_bytes) for p in best
    )


def _first_that_fits(
    counts: list[int], cap: int, least: Callable[[int], int], yes: str, no: str
) -> str:
    needed = 0
    for count in counts:
        needed = least(count)
        if needed <= cap:
            return yes.format(count, _size(needed))
    return no.format(counts[-1], _size(needed))


def _shrunk(graph: CoarseGraph, factor: int) -> CoarseGraph:
    """Returns the graph for a microbatch that is smaller by `factor`."""
    return replace(
        graph,
        residual_bytes=graph.residual_bytes // factor,
        selective_bytes=_part(graph.selective_bytes, factor),
        full_bytes=_part(graph.full_bytes, factor),
        tensors=tuple(
            tensor._replace(
                forward_bytes=tensor.forward_bytes // factor,
                backward_bytes=tensor.backward_bytes // factor,
            )
            for tensor in graph.tensors
        ),
    )


def _part(num_bytes: NDArray[np.int64] | None, factor: int) -> NDArray[np.int64] | None:
    return None if num_bytes is None else num_bytes // factor


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} TiB"
