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


@pytest.mark.parametrize(
    ("name", "held"),
    [
        ("interleaved", [4, 4, 3, 1]),
        ("simple", [12, 12, 12, 12]),
        ("zb_h2", [7, 6, 5, 4]),
        ("v_half", [3, 3, 3, 3]),
        ("auto", [6, 6, 6, 6]),
    ],
)
def test_partitions_hold_what_the_schedule_holds(name: str, held: list[int]) -> None:
    settings = PlanSettings(microbatches=12, pipeline=name)
    assert settings.microbatches_held(4).tolist() == held
    assert max(held) <= settings.microbatches_in_flight(4)
    away = PlanSettings(microbatches=12, pipeline=name, offload="residuals")
    assert away.microbatches_resident(4).tolist() == [min(3, count) for count in held]


def test_partitions_hold_no_more_than_may_be_in_flight() -> None:
    few = PlanSettings(microbatches=12, active_microbatches=2)
    assert few.microbatches_held(4).tolist() == [2, 2, 2, 1]
    bound = PlanSettings(microbatches=12, pipeline="zb_v", active_microbatches=2)
    assert bound.microbatches_held(4).tolist() == [2] * 4
    pieces = PlanSettings(microbatches=12, pieces=2)
    assert pieces.microbatches_held(4).tolist() == [6] * 4
    assert PlanSettings(microbatches=9000).microbatches_held(1000).tolist() == [1000] * 1000


def test_an_own_order_may_hold_all() -> None:
    settings = PlanSettings.of(Config(4, microbatches=12, pipeline="mine.json"))
    assert settings.scheduled == "mine.json"
    assert settings.microbatches_held(4).tolist() == [12] * 4
    assert "pipeline 'mine.json'" in str(settings)
    assert PlanSettings().scheduled == "interleaved"
