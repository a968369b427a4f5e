from __future__ import annotations

import pytest

from opensmp.compiler.schedule.actions import TaskGraph
from opensmp.compiler.schedule.methods.zb_h2 import passes, zb_h2
from opensmp.compiler.schedule.simulate import simulate
from opensmp.config.pipelines import PIPELINES
from schedules import is_drawn_in_docstring, simulated


@pytest.mark.parametrize("partitions", [1, 2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize("more", [0, 1, 2, 5, 30])
def test_devices_wait_only_for_the_first_microbatch(partitions: int, more: int) -> None:
    microbatches = partitions + more
    simulation = simulated(passes, partitions, microbatches, pieces=1)
    assert simulation.makespan_seconds == 3 * microbatches + partitions - 1
    held = [min(2 * partitions - 1 - d, microbatches) for d in range(partitions)]
    assert simulation.live_activations.tolist() == held
    by_config = PIPELINES["zb_h2"].held
    assert by_config is not None
    assert by_config(partitions) == 2 * partitions - 1


@pytest.mark.parametrize("partitions", [2, 3, 4, 8])
def test_first_segment_may_have_a_whole_backward_pass(partitions: int) -> None:
    graph = TaskGraph.chain(partitions, 3 * partitions, split_backward=True)
    schedule = zb_h2(graph, 3 * partitions)
    assert schedule.active_microbatches is None
    assert simulate(schedule, graph).makespan_seconds == 10 * partitions - 1


def test_picture() -> None:
    graph = TaskGraph.chain(2, 4, split_backward=True)
    assert is_drawn_in_docstring(zb_h2(graph, 4), graph, zb_h2)


def test_keeps_a_bound() -> None:
    graph = TaskGraph.chain(3, 9, split_backward=True)
    schedule = zb_h2(graph, 2)
    assert schedule.active_microbatches == 2
    assert simulate(schedule, graph).peak_in_flight <= 2
