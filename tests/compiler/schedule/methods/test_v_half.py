from __future__ import annotations

import pytest

from opensmp.compiler.schedule.methods.v_half import passes
from opensmp.config.pipelines import PIPELINES
from schedules import simulated


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
