from __future__ import annotations

import pytest

from opensmp.compiler.schedule.methods.dualpipe_v import dualpipe_v, passes
from opensmp.compiler.schedule.regular.passes import BACKWARD
from opensmp.compiler.schedule.simulate import simulate
from opensmp.config.pipelines import PIPELINES
from opensmp.errors import ScheduleError
from schedules import is_drawn_in_docstring, simulated, v_chain


@pytest.mark.parametrize("partitions", [2, 3, 4, 5, 6, 7, 8, 9, 12, 16])
@pytest.mark.parametrize("more", [0, 1, 2, 5, 30])
def test_has_a_step_as_short_as_possible(partitions: int, more: int) -> None:
    microbatches = 2 * partitions + more
    simulation = simulated(passes, partitions, microbatches)
    held = partitions + 0.5
    assert simulation.makespan_seconds == 6 * microbatches + partitions - 1
    assert max(simulation.live_activations) <= 2 * held
    if microbatches >= 2 * partitions > 4:
        assert max(simulation.live_activations) == 2 * held
    held_by_config = PIPELINES["dualpipe_v"].held
    assert held_by_config is not None
    assert held <= held_by_config(partitions) < held + 1


@pytest.mark.parametrize("partitions", [1, 2, 3, 8])
@pytest.mark.parametrize("microbatches", [1, 2, 3, 5])
def test_few_microbatches_and_a_first_segment_whose_backward_pass_is_whole(
    partitions: int, microbatches: int
) -> None:
    graph = v_chain(partitions, microbatches)
    schedule = dualpipe_v(graph, microbatches)
    assert schedule.active_microbatches is None, "its own order fits the graph"
    long = simulate(schedule, graph).makespan_seconds
    simulation = simulated(passes, partitions, microbatches)
    assert long <= simulation.makespan_seconds + 2
    assert (simulation.end[BACKWARD] > 0).all()


def test_picture() -> None:
    graph = v_chain(2, 3)
    assert is_drawn_in_docstring(dualpipe_v(graph, 3), graph, dualpipe_v)


def test_refuses_a_bound_of_zero() -> None:
    with pytest.raises(ScheduleError, match="'dualpipe_v': active_microbatches=0"):
        dualpipe_v(v_chain(2, 2), 0)


def test_keeps_a_bound() -> None:
    graph = v_chain(3, 9)
    schedule = dualpipe_v(graph, 2)
    assert schedule.active_microbatches == 2
    assert simulate(schedule, graph).peak_in_flight <= 2
