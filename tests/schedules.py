"""What the tests of schedules share."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Sequence

from opensmp.compiler.schedule.actions import Schedule, TaskGraph
from opensmp.compiler.schedule.grid import grid
from opensmp.compiler.schedule.regular.passes import Passes
from opensmp.compiler.schedule.regular.pipeline import RegularPipeline
from opensmp.compiler.schedule.regular.simulation import RegularSimulation, simulate_regular
from opensmp.compiler.schedule.simulate import simulate


def v_chain(partitions: int, microbatches: int) -> TaskGraph:
    """A model of two pieces for each partition, the first and the last one in partition 0."""
    devices = [*range(partitions), *reversed(range(partitions))]
    return TaskGraph.chain(2 * partitions, microbatches, split_backward=True, devices=devices)


def simulated(
    generator: Callable[[int, int, int], Sequence[Passes]],
    partitions: int,
    microbatches: int,
    pieces: int = 2,
) -> RegularSimulation:
    """A step of equal passes; several pieces lie in a V."""
    pipeline = RegularPipeline(partitions, microbatches, pieces, "v")
    regular = pipeline.schedule("under test", generator)
    result = simulate_regular(regular)
    if pipeline.num_actions < 2000:
        by_objects = simulate(regular.schedule(), pipeline.graph())
        assert result.makespan_seconds == by_objects.makespan_seconds
        assert tuple(result.live_activations) == by_objects.live_activations
        assert result.peak_in_flight == by_objects.peak_in_flight
    return result


def is_drawn_in_docstring(schedule: Schedule, graph: TaskGraph, function: object) -> bool:
    """Whether the docstring of a schedule's function has this picture."""
    return textwrap.indent(grid(schedule, graph), 4 * " ") in (inspect.getdoc(function) or "")
