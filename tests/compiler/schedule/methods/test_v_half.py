from __future__ import annotations

import pytest

from opensmp.compiler.schedule.methods.v_half import passes, v_half
from opensmp.compiler.schedule.regular.passes import BACKWARD
from opensmp.compiler.schedule.simulate import simulate
from opensmp.config.pipelines import PIPELINES
from opensmp.errors import ScheduleError
from schedules import is_drawn_in_docstring, simulated, v_chain


@pytest.mark.parametrize("partitions", [2, 3, 4, 5, 6, 7, 8, 9, 12, 16])
@pytest.mark.parametrize("more", [0, 1, 2, 5, 30])
def test_has_half_the_memory_of_1f1b(partitions: int, more: int) -> None:
    microbatches = partitions + 1 + more
    simulation = simulated(passes, partitions, microbatches)
    held = partitions // 2 + 1
    ahead = (7 * partitions - (9 if partitions % 2 else 6)) // 2
    assert simulation.makespan_seconds == 6 * microbatches + ahead
    assert max(simulation.live_activations) <= 2 * held
    if microbatches >= 2 * partitions > 4:
        assert max(simulation.live_activations) == 2 * held
    held_by_config = PIPELINES["v_half"].held
    assert held_by_config is not None
    assert held <= held_by_config(partitions) < held + 1


@pytest.mark.parametrize("partitions", [1, 2, 3, 8])
@pytest.mark.parametrize("microbatches", [1, 2, 3, 5])
def test_few_microbatches_and_a_first_segment_whose_backward_pass_is_whole(
    partitions: int, microbatches: int
) -> None:
    graph = v_chain(partitions, microbatches)
    schedule = v_half(graph, microbatches)
    assert schedule.active_microbatches is None, "its own order fits the graph"
    long = simulate(schedule, graph).makespan_seconds
    simulation = simulated(passes, partitions, microbatches)
    assert long <= simulation.makespan_seconds + 2
    assert (simulation.end[BACKWARD] > 0).all()


def test_picture() -> None:
    graph = v_chain(2, 2)
    assert is_drawn_in_docstring(v_half(graph, 3), graph, v_half)


def test_refuses_a_bound_of_zero() -> None:
    with pytest.raises(ScheduleError, match="'v_half': active_microbatches=0"):
        v_half(v_chain(2, 2), 0)


def test_keeps_a_bound() -> None:
    graph = v_chain(3, 9)
    schedule = v_half(graph, 2)
    assert schedule.active_microbatches == 2
    assert simulate(schedule, graph).peak_in_flight <= 2
