from __future__ import annotations

import pytest

from opensmp.compiler.schedule.methods.zb_v import passes
from opensmp.config.pipelines import PIPELINES
from schedules import simulated


@pytest.mark.parametrize("partitions", [2, 3, 4, 5, 6, 7, 8, 9, 12, 16])
@pytest.mark.parametrize("more", [0, 1, 2, 5, 30])
def test_has_no_more_memory_than_1f1b_and_almost_no_bubble(partitions: int, more: int) -> None:
    microbatches = partitions + more
    simulation = simulated(passes, partitions, microbatches)
    held = partitions
    assert simulation.makespan_seconds == 6 * microbatches + 2 * partitions - 3
    assert max(simulation.live_activations) <= 2 * held
    if microbatches >= 2 * partitions > 4:
        assert max(simulation.live_activations) == 2 * held
    held_by_config = PIPELINES["zb_v"].held
    assert held_by_config is not None
    assert held <= held_by_config(partitions) < held + 1
