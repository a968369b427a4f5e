from __future__ import annotations

import numpy as np
import pytest

from opensmp.compiler.plan.settings import PlanSettings
from opensmp.config import Config
from opensmp.config.pipelines import PIPELINES


def test_stages_go_to_the_partitions_in_turn() -> None:
    settings = PlanSettings(pieces=2)
    assert settings.pieces_per_partition == 2
    assert settings.partition_of_stage(np.arange(6), 3).tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("name", sorted(n for n, r in PIPELINES.items() if r.placement == "v"))
def test_stages_of_a_v_go_forth_and_back(name: str) -> None:
    settings = PlanSettings(pipeline=name)
    assert settings.pieces_per_partition == 2
    assert settings.partition_of_stage(np.arange(6), 3).tolist() == [0, 1, 2, 2, 1, 0]


@pytest.mark.parametrize(
    ("name", "held"),
    [("zb_h2", 15), ("zb_v", 8), ("v_half", 5), ("v_min", 4), ("dualpipe_v", 9), ("auto", 10)],
)
def test_schedules_with_an_order_of_their_own_say_what_they_hold(name: str, held: int) -> None:
    assert PlanSettings(microbatches=32, pipeline=name).microbatches_in_flight(8) == held
    few = PlanSettings(microbatches=32, pipeline=name, active_microbatches=2)
    assert few.microbatches_in_flight(8) == 2
    assert PlanSettings(microbatches=3, pipeline=name).microbatches_in_flight(8) == 3


@pytest.mark.parametrize("pipeline", ["mine.json", lambda graph: []])
def test_order_of_a_users_own_is_planned_as_the_default(pipeline: object) -> None:
    settings = PlanSettings.of(Config.resolve({"pipeline": pipeline}))
    assert settings.pipeline == "interleaved"
