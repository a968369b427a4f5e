"""Orders the actions of any task graph as a schedule of equal stages does."""

from __future__ import annotations

from collections import defaultdict

from opensmp.compiler.schedule.actions import Action, Schedule, TaskGraph
from opensmp.compiler.schedule.list_scheduling import list_schedule
from opensmp.compiler.schedule.regular.passes import KINDS_OF_PASSES
from opensmp.compiler.schedule.regular.pipeline import Generator
from opensmp.compiler.schedule.validate import run_orders
from opensmp.config.pipelines import most_in_flight
from opensmp.errors import ScheduleError

_NUMBER_OF_KIND = {kind: number for number, kind in enumerate(KINDS_OF_PASSES)}
_NUMBER_OF_KIND["R"] = _NUMBER_OF_KIND["B"]  # before the backward pass that it is for
_RANK = {"F": 0, "R": 1, "B": 2, "W": 3}


def on_graph(
    name: str,
    graph: TaskGraph,
    generator: Generator,
    active_microbatches: int,
    pieces: int | None = None,
) -> Schedule:
    """Orders the actions of a graph as `generator` orders those of equal stages.

    The graph may lack some actions, such as those of segments that are not trained. If it needs
    another order, because segments lie elsewhere or microbatches depend on each other, or if fewer
    microbatches may be in flight than there are, the order becomes the priority of a list schedule.

    Args:
        name: Name of the schedule.
        graph: Any task graph.
        generator: Makes the passes of each device.
        active_microbatches: Maximum number of microbatches in flight, >= 1.
        pieces: Number of segments of each device that `generator` is for; None for those of the
            graph. Later segments of a device count as its last piece.

    Raises:
        ScheduleError: If `active_microbatches` is below 1.
    """
    if active_microbatches < 1:
        raise ScheduleError(
            f"Schedule {name!r}: active_microbatches={active_microbatches} is not possible; "
            "give at least 1, the number of microbatches that may be in flight at once."
        )
    key = _keys(graph, generator, pieces)
    num_microbatches = len(graph.microbatches)
    if active_microbatches >= num_microbatches:
        table = graph.table
        orders: list[list[int]] = [[] for _ in range(graph.num_devices)]
        for i in sorted(range(len(table.actions)), key=lambda i: key[table.actions[i]]):
            orders[table.device[i]].append(i)
        if run_orders(orders, (), table, 0.0) is not None:
            actions = tuple(tuple(table.actions[i] for i in order) for order in orders)
            return Schedule(name, actions, None, (), graph)
        active_microbatches = most_in_flight(graph.num_devices)
    return list_schedule(
        graph,
        name=name,
        priority=key.__getitem__,
        active_microbatches=max(1, min(active_microbatches, num_microbatches)),
    )


def _keys(
    graph: TaskGraph, generator: Generator, pieces: int | None
) -> dict[Action, tuple[int, ...]]:
    """By what the actions of a device are sorted: the place of their pass, and what is equal."""
    segments: dict[int, set[int]] = defaultdict(set)
    for action, device in graph.device.items():
        segments[device].add(action.segment)
    most = pieces or max(map(len, segments.values()), default=1)
    piece = {
        (device, segment): min(position, most - 1)
        for device, present in segments.items()
        for position, segment in enumerate(sorted(present))
    }
    number = {microbatch: i for i, microbatch in enumerate(graph.microbatches)}
    place: list[dict[tuple[int, int, int], int]] = [
        {(kind, piece, microbatch): i for i, (kind, piece, microbatch) in enumerate(each.tolist())}
        for each in generator(graph.num_devices, len(number), most)
    ]
    return {
        action: (
            place[device][
                _NUMBER_OF_KIND[action.kind],
                piece[device, action.segment],
                number[action.microbatch],
            ],
            _RANK[action.kind],
            action.call,
            action.segment if action.kind == "F" else -action.segment,
        )
        for action, device in graph.device.items()
    }
