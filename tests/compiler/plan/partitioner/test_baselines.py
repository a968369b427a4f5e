from __future__ import annotations

import itertools

import numpy as np
import pytest
from compiler.plan.unit_graphs import chain, problem_of
from hypothesis import example, given
from hypothesis import strategies as st

from opensmp.compiler.plan.partitioner.baselines import (
    block_runs,
    even_runs,
    simple_runs,
    tightest_runs,
)
from opensmp.compiler.plan.partitioner.partitioner import partition_units
from opensmp.compiler.plan.settings import PlanSettings

WEIGHTS = st.lists(st.integers(0, 50), min_size=1, max_size=40)


def test_even_runs_end_at_equal_shares_of_the_weight() -> None:
    assert even_runs([1, 1, 1, 1, 4], 2).tolist() == [0, 0, 0, 0, 1]
    assert even_runs([1] * 6, 3).tolist() == [0, 0, 1, 1, 2, 2]


def test_units_wander_from_the_heaviest_block_to_the_lightest() -> None:
    assert block_runs([1, 1, 1, 3, 3], 2).tolist() == [0, 0, 0, 1, 1]
    assert block_runs([1] * 7 + [3] * 3, 2).tolist() == [0] * 7 + [1] * 3
    assert block_runs([3] * 3 + [1] * 7, 2).tolist() == [0] * 3 + [1] * 7


@given(WEIGHTS, st.integers(1, 8))
def test_runs_go_up_and_none_is_empty(weights: list[int], count: int) -> None:
    count = min(count, len(weights))
    for make in (even_runs, block_runs, tightest_runs):
        placed = make(weights, count)
        assert placed.dtype == np.int64
        assert (np.diff(placed) >= 0).all()
        assert np.unique(placed).tolist() == list(range(count))


@given(st.lists(st.integers(10, 19), min_size=1, max_size=40), st.integers(1, 8))
@example([10, 12, 10, 11, 13, 10, 12, 12, 12], 7)  # units that move towards the lightest run fail
def test_sums_of_blocks_differ_by_no_more_than_the_largest_weight(
    weights: list[int], count: int
) -> None:
    count = min(count, len(weights))
    sums = np.bincount(block_runs(weights, count), weights)
    assert sums.max() - sums.min() <= max(weights)


def test_blocks_stay_where_they_differ_by_the_largest_weight_or_less() -> None:
    assert block_runs([1, 1, 1, 1, 4], 2).tolist() == [0, 0, 1, 1, 1]


def test_simple_plans_are_runs_by_number_by_time_and_by_bytes() -> None:
    graph = chain([3.0, 1.0, 1.0, 1.0], num_bytes=0, residual_bytes=[0, 0, 0, 1000])
    plans = [placed.tolist() for placed in simple_runs(problem_of(graph, 2))]
    assert plans[:4] == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]]
    assert len(plans) == 6


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.integers(1, 5))
def test_no_other_runs_have_a_lighter_heaviest_one(weights: list[int], count: int) -> None:
    count = min(count, len(weights))
    all_cuts = itertools.combinations(range(1, len(weights)), count - 1)
    bounds = ([0, *cuts, len(weights)] for cuts in all_cuts)
    least = min(max(sum(weights[a:b]) for a, b in itertools.pairwise(ends)) for ends in bounds)
    assert np.bincount(tightest_runs(weights, count), weights).max() == least


@pytest.mark.parametrize("count", [64, 256, 1024])
def test_the_slowest_of_many_stages_is_nearly_as_fast_as_can_be(count: int) -> None:
    seconds = np.random.default_rng(count).lognormal(0.0, 0.7, 2000)
    settings = PlanSettings(microbatches=4 * count, optimize="speed")
    placed = partition_units(chain(seconds.tolist(), 1), count, settings)
    ticks = np.round(seconds * 1e6).astype(np.int64)
    least = np.bincount(tightest_runs(ticks, count), seconds).max()
    assert np.bincount(placed, seconds).max() <= 1.03 * least
