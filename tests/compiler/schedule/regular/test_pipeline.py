from __future__ import annotations

import pytest

from opensmp.compiler.schedule.methods import breadth_first
from opensmp.compiler.schedule.regular.pipeline import RegularPipeline
from opensmp.compiler.schedule.validate import validate
from opensmp.errors import ScheduleError


def test_pieces_go_round_or_back_and_forth() -> None:
    assert RegularPipeline(3, 1, 3).device_of_segment.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2]
    assert RegularPipeline(3, 1, 3, "v").device_of_segment.tolist() == [0, 1, 2, 2, 1, 0, 0, 1, 2]


@pytest.mark.parametrize("placement", ["loop", "v"])
@pytest.mark.parametrize("weights", [0.0, 1.0])
def test_objects_fit_the_graph(placement: str, weights: float) -> None:
    pipeline = RegularPipeline(3, 4, 2, placement, (1.0, 1.0, weights))  # type: ignore[arg-type]
    graph = pipeline.graph()
    assert len(graph.device) == pipeline.num_actions
    validate(pipeline.schedule("breadth_first", breadth_first.passes).schedule(), graph)


def test_impossible_numbers_are_refused() -> None:
    with pytest.raises(ScheduleError, match="num_devices=0, num_microbatches=2 and pieces=1"):
        RegularPipeline(0, 2)
    with pytest.raises(ScheduleError, match="not negative"):
        RegularPipeline(1, 2, seconds=(1.0, -1.0, 0.0))
