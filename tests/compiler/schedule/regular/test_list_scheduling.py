from __future__ import annotations

import pytest

from opensmp.compiler.schedule.methods import zero_bubble as module
from opensmp.compiler.schedule.pipelines import BUILDERS
from opensmp.compiler.schedule.regular.list_scheduling import list_regular
from opensmp.compiler.schedule.regular.pipeline import RegularPipeline
from opensmp.compiler.schedule.regular.simulation import simulate_regular
from opensmp.errors import ScheduleError


@pytest.mark.parametrize("name", ["simple", "interleaved", "zero_bubble"])
@pytest.mark.parametrize("devices", [1, 2, 3, 6])
@pytest.mark.parametrize("microbatches", [1, 2, 7, 16])
@pytest.mark.parametrize("seconds", [(1.0, 1.0, 1.0), (1.0, 2.0, 0.0), (0.3, 0.7, 0.2)])
@pytest.mark.parametrize("more", [0, 2, 20])
def test_orders_are_those_of_the_objects(
    name: str,
    devices: int,
    microbatches: int,
    seconds: tuple[float, float, float],
    more: int,
) -> None:
    pipeline = RegularPipeline(devices, microbatches, seconds=seconds)
    bound = max(1, devices + more)
    by_objects = BUILDERS[name](pipeline.graph(), bound)
    assert list_regular(name, pipeline, bound).schedule().orders == by_objects.orders


@pytest.mark.parametrize("more", [0, 2, 12])
def test_large_ones_try_as_few_numbers_as_the_objects(
    more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_ACTIONS_TO_SEARCH", 0)
    pipeline = RegularPipeline(12, 30)
    by_objects = BUILDERS["zero_bubble"](pipeline.graph(), 12 + more)
    assert list_regular("zero_bubble", pipeline, 12 + more).schedule().orders == by_objects.orders


def test_large_pipeline_keeps_its_bound_and_has_the_bubble_of_1f1b() -> None:
    pipeline = RegularPipeline(100, 300)
    simulation = simulate_regular(list_regular("interleaved", pipeline, 100))
    assert simulation.makespan_seconds == 3 * 300 + 2 * 99
    assert simulation.peak_in_flight <= 100


def test_what_cannot_be_scheduled_so_is_refused() -> None:
    with pytest.raises(ScheduleError, match="'zb_v' is not a list schedule; choose 'simple'"):
        list_regular("zb_v", RegularPipeline(2, 2), 2)
    with pytest.raises(ScheduleError, match="pieces=2 must be 1 and active_microbatches=2"):
        list_regular("interleaved", RegularPipeline(2, 2, 2), 2)
    with pytest.raises(ScheduleError, match="active_microbatches=0 at least 1"):
        list_regular("interleaved", RegularPipeline(2, 2), 0)
