from __future__ import annotations

import pytest

from opensmp.compiler.schedule.methods.dualpipe_v import passes
from opensmp.config.pipelines import PIPELINES
from schedules import simulated


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
