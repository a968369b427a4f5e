from __future__ import annotations

import pytest

from opensmp.compiler.schedule.actions import TaskGraph
from opensmp.compiler.schedule.methods.breadth_first import breadth_first, passes
from opensmp.compiler.schedule.methods.simple import simple
from opensmp.compiler.schedule.regular.pipeline import RegularPipeline
from opensmp.compiler.schedule.regular.simulation import simulate_regular
from opensmp.compiler.schedule.simulate import simulate
from schedules import is_drawn_in_docstring


@pytest.mark.parametrize("partitions", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("pieces", [1, 2, 3, 5])
@pytest.mark.parametrize("more", [0, 1, 7])
def test_bubble_is_that_of_interleaved_1f1b(partitions: int, pieces: int, more: int) -> None:
    microbatches = partitions + more
    pipeline = RegularPipeline(partitions, microbatches, pieces, seconds=(1.0, 2.0, 0.0))
    simulation = simulate_regular(pipeline.schedule("breadth_first", passes))
    assert simulation.makespan_seconds == 3 * (pieces * microbatches + partitions - 1)
    assert simulation.bubble == pytest.approx(
        (partitions - 1) / (pieces * microbatches + partitions - 1)
    )
    assert set(simulation.live_activations) == {pieces * microbatches}


@pytest.mark.parametrize("split", [True, False])
def test_with_one_piece_it_is_simple(split: bool) -> None:
    graph = TaskGraph.chain(3, 5, split_backward=split)
    assert breadth_first(graph).orders == simple(graph).orders


def test_each_piece_is_needed_once_in_each_direction() -> None:
    devices = (0, 1, 0, 1, 0, 1)
    graph = TaskGraph.chain(6, 4, split_backward=True, devices=devices)
    for order in breadth_first(graph).orders:
        visits = [
            (action.segment, action.kind == "F")
            for before, action in zip((None, *order), order, strict=False)
            if before is None or before.segment != action.segment
        ]
        assert len(visits) == len(set(visits)) <= 6
    assert simulate(breadth_first(graph), graph).peak_in_flight == 4


def test_picture() -> None:
    graph = TaskGraph.chain(4, 2, devices=(0, 1, 0, 1))
    assert is_drawn_in_docstring(breadth_first(graph), graph, breadth_first)
