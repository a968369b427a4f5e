from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from compiler.plan.hand_made import MACHINE, chain

from opensmp.compiler.plan.report.recommendation import recommend, shortfall
from opensmp.compiler.plan.unit_graph import Machine
from opensmp.errors import PlanError


def graph_for(microbatches: int):
    """A chain of eight units whose time and tensors shrink with the microbatch."""
    graph = chain(8, forward=[8 / microbatches] * 8, tensors=[])
    graph.residual_bytes[:] = 1600 // microbatches
    return graph


def configurations(candidates):
    return [
        (c.num_partitions, c.settings.microbatches, c.settings.pipeline, c.fits) for c in candidates
    ]


def test_fastest_that_fits_comes_first():
    candidates = recommend(graph_for, 16, MACHINE, partitions=(1, 2, 4))
    assert candidates[0].num_partitions == 4
    assert candidates[0].settings.microbatches == 16
    seconds = [c.prediction.step_seconds for c in candidates]
    assert seconds == sorted(seconds)
    assert all(c.fits for c in candidates)


def test_of_equal_speed_the_one_with_less_memory_comes_first():
    # The formula of a step knows no schedule; simple holds all microbatches.
    first, second = recommend(graph_for, 16, MACHINE, partitions=[4], microbatches=[16])
    assert (first.settings.pipeline, second.settings.pipeline) == ("interleaved", "simple")
    assert first.prediction.step_seconds == second.prediction.step_seconds
    assert first.peak_bytes < second.peak_bytes


def test_what_does_not_fit_follows_by_how_far_off_it_is():
    machine = Machine(memory_bytes=3000)
    candidates = recommend(graph_for, 4, machine, partitions=(1, 2, 8))
    fits = [c.fits for c in candidates]
    assert fits == sorted(fits, reverse=True)
    assert True in fits
    assert False in fits
    assert all(max(c.prediction.peak_bytes) <= 3000 for c in candidates if c.fits)
    missing = [c.peak_bytes for c in candidates if not c.fits]
    assert missing == sorted(missing)
    assert min(missing) > 3000
    assert shortfall(candidates, machine) == ""


def test_nothing_fits_says_how_far_off():
    machine = Machine(memory_bytes=100)
    candidates = recommend(graph_for, 4, machine, partitions=(1, 2))
    assert not any(c.fits for c in candidates)
    text = shortfall(candidates, machine)
    closest = candidates[0]
    assert "No configuration fits 100 B per device" in text
    assert f"{closest.num_partitions} partitions" in text
    assert "More partitions, a smaller batch or larger devices would help" in text


def test_schedules_that_the_formula_does_not_know_are_simulated():
    fast = replace(MACHINE, transfer_seconds=0.0, transfer_bytes_per_second=1e12)

    def pipeline_for(microbatches: int):
        return chain(8, forward=[8 / microbatches] * 8)

    candidates = recommend(pipeline_for, 16, fast, partitions=(1, 2, 4), simulated=3)
    simulated = [c for c in candidates if c.simulation is not None]
    assert len({(c.num_partitions, c.settings.microbatches) for c in simulated}) == 3
    kinds = {(c.settings.pipeline, c.settings.pieces) for c in simulated}
    assert kinds >= {("zero_bubble", 1), ("interleaved", 1), ("interleaved", 2), ("simple", 1)}
    seconds = [c.step_seconds for c in candidates]
    assert seconds == sorted(seconds)
    assert candidates[0].bubble > 0
    best = next(c for c in candidates if c.settings.pipeline == "zero_bubble")
    other = next(
        c
        for c in candidates
        if c.settings == replace(best.settings, pipeline="interleaved")
        and c.num_partitions == best.num_partitions
    )
    assert best.step_seconds < other.step_seconds <= other.prediction.step_seconds
    for candidate in candidates:
        assert set(candidate.assignment) == set(range(candidate.num_partitions))


def test_what_is_simulated_keeps_to_the_memory():
    machine = Machine(memory_bytes=3000)
    candidates = recommend(graph_for, 8, machine, partitions=(2, 4), simulated=8)
    assert any(c.simulation is not None for c in candidates)
    assert all(c.peak_bytes <= 3000 for c in candidates if c.fits)


@pytest.mark.parametrize(
    ("batch", "counts"), [(8, {1, 2, 4}), (3, {1}), (1, {1}), (12, {1, 2, 3, 4, 6})]
)
def test_microbatches_have_the_rows_that_a_model_needs(batch, counts):
    candidates = recommend(graph_for, batch, MACHINE, partitions=[2], least_rows=2)
    assert {c.settings.microbatches for c in candidates} == counts


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_no_microbatch_is_without_rows(batch):
    candidates = recommend(graph_for, batch, MACHINE, partitions=[2], simulated=2)
    assert max(c.settings.microbatches for c in candidates) <= batch


def test_only_divisors_of_the_batch_are_tried():
    candidates = recommend(graph_for, 6, MACHINE, partitions=[2])
    assert {c.settings.microbatches for c in candidates} == {1, 2, 3, 6}


def test_schedules_are_not_told_apart_where_they_are_the_same():
    candidates = recommend(graph_for, 2, MACHINE, partitions=(1, 2))
    assert len([c for c in candidates if c.num_partitions == 1]) == 2
    assert len([c for c in candidates if c.settings.microbatches == 1]) == 2


def test_more_partitions_than_units_are_left_out():
    candidates = recommend(lambda m: chain(2), 1, MACHINE, partitions=(1, 2, 3))
    assert {c.num_partitions for c in candidates} == {1, 2}


def test_graph_is_asked_for_once_per_number_of_microbatches():
    asked = []
    recommend(lambda m: asked.append(m) or chain(3), 4, MACHINE, partitions=(1, 2, 3))
    assert asked == [1, 2, 4]


def test_assignment_is_what_was_predicted():
    for candidate in recommend(graph_for, 4, MACHINE, partitions=(2, 4)):
        assert candidate.assignment.dtype == np.int64
        assert set(candidate.assignment.tolist()) == set(range(candidate.num_partitions))


def test_no_number_of_microbatches_that_divides_is_refused():
    with pytest.raises(PlanError, match=r"none of .* \[4, 7\] divides the batch of 6"):
        recommend(graph_for, 6, MACHINE, partitions=[2], microbatches=[4, 7])
