from __future__ import annotations

import pytest

from opensmp.compiler.schedule.pipelines import build
from opensmp.compiler.schedule.regular.orders import held_activations, is_regular, regular_order
from opensmp.compiler.schedule.regular.simulation import simulate_regular
from opensmp.compiler.schedule.simulate import simulate
from opensmp.config.pipelines import PIPELINES


def test_interleaved_order_is_megatrons():
    schedule = regular_order("interleaved", 2, 4, 2, False, None).schedule()
    assert [" ".join(map(str, order)) for order in schedule.orders] == [
        "0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 2B3 0B2 0B3",
        "1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3",
    ]


@pytest.mark.parametrize("partitions", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("pieces", [2, 3, 4])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_interleaved_bubble_falls_with_the_pieces(partitions, pieces, groups):
    microbatches = groups * partitions
    schedule = regular_order("interleaved", partitions, microbatches, pieces, False, None)
    bubble = simulate_regular(schedule).bubble
    expected = (partitions - 1) / (pieces * microbatches + partitions - 1)
    assert bubble == pytest.approx(expected)


def test_a_step_runs_the_interleaved_order_if_it_may_have_as_many_in_flight():
    for partitions, microbatches, pieces in ((4, 16, 2), (8, 16, 3)):
        schedule = regular_order("interleaved", partitions, microbatches, pieces, True, None)
        result = simulate_regular(schedule, 0.1)
        graph = schedule.pipeline.graph()
        built = build("interleaved", graph, result.peak_in_flight)
        assert simulate(built, graph, 0.1).makespan_seconds == pytest.approx(
            result.makespan_seconds
        )


@pytest.mark.parametrize("name", sorted(set(PIPELINES) - {"auto"}))
@pytest.mark.parametrize(("partitions", "microbatches"), [(2, 3), (3, 12), (4, 9), (5, 20)])
def test_order_alone_says_what_is_held(name, partitions, microbatches):
    pieces = PIPELINES[name].pieces or 1
    schedule = regular_order(name, partitions, microbatches, pieces, True, None)
    held = held_activations(schedule)
    assert held.shape == (partitions, pieces)
    live = simulate_regular(schedule).live_activations
    # A result is alive until another device has read it, which the order does not show.
    assert (held.sum(axis=1) <= live).all()
    assert (held.sum(axis=1) >= live - 1).all()


def test_schedules_that_need_objects_are_told():
    assert is_regular("interleaved", 2, 4, 8)
    assert not is_regular("interleaved", 2, 4, 9)
    assert not is_regular("auto", 1, 4, 8)
    assert not is_regular("zero_bubble", 2, 4, 8)
    assert not is_regular("mine.json", 1, 4, 8)
    assert is_regular("zb_v", 2, 4, 9)
