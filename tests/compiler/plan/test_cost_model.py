from __future__ import annotations

import numpy as np
import pytest
from compiler.plan.unit_graphs import MACHINES, chain, made_for, problem_of, unit_graph, unit_graphs
from hypothesis import given, settings
from hypothesis import strategies as st

from opensmp.compiler.plan.cost_model import evaluate, seconds_to_move
from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.plan.unit_graph import CoarseGraph, Machine, SharedVariable
from opensmp.compiler.schedule.actions import TaskGraph
from opensmp.compiler.schedule.pipelines import build
from opensmp.errors import PlanError

# 100 B take one second, and so does nothing at all.
MACHINE = Machine(transfer_seconds=1.0, transfer_bytes_per_second=100.0)


def test_moving_a_tensor_takes_latency_and_bytes_over_bandwidth() -> None:
    assert seconds_to_move(MACHINE, 300) == 4.0


def test_step_is_sum_of_stages_and_slowest_for_every_further_microbatch() -> None:
    prediction = evaluate(chain([1.0, 2.0, 1.0]), [0, 1, 1], 2, made_for(MACHINE, 5))
    assert prediction.forward_seconds == (1.0, 3.0)
    assert prediction.backward_seconds == (2.0, 6.0)
    assert prediction.transfer_seconds == (2.0, 2.0)
    assert prediction.stage_seconds == (5.0, 11.0)
    assert prediction.step_seconds == 16 + 4 * 11
    assert prediction.balance == 11 / 8
    assert prediction.bubble == pytest.approx(1 - 5 * 16 / (2 * 60))


def test_reader_pays_for_the_tensor_and_maker_for_its_gradient() -> None:
    graph = unit_graph([0.0, 0.0], [(0, (1,), 100)])
    assert evaluate(graph, [0, 1], 2, made_for(MACHINE, 1)).transfer_seconds == (2.0, 2.0)


def test_frozen_maker_pays_for_no_gradient() -> None:
    graph = unit_graph([1.0, 1.0], [(0, (1,), 100)], frozen=[0])
    prediction = evaluate(graph, [0, 1], 2, made_for(MACHINE, 1))
    assert prediction.transfer_seconds == (0.0, 2.0)
    assert prediction.backward_seconds == (0.0, 2.0)
    assert prediction.cut_bytes == 100


def test_tensor_goes_once_to_each_partition_that_reads_it() -> None:
    graph = unit_graph([0.0] * 5, [(0, (1, 2, 3, 4), 100)])
    prediction = evaluate(graph, [0, 0, 1, 1, 2], 3, made_for(MACHINE, 1))
    assert prediction.transfer_seconds == (4.0, 2.0, 2.0)
    assert prediction.cut_bytes == 2 * 200


def test_nothing_is_paid_inside_a_partition() -> None:
    prediction = evaluate(chain([1.0, 1.0]), [1, 1], 2, made_for(MACHINE, 3))
    assert prediction.transfer_seconds == (0.0, 0.0)
    assert prediction.cut_bytes == 0
    assert prediction.empty_partitions == (0,)
    assert prediction.num_units == (0, 2)


def test_tied_embedding_lives_with_its_first_reader_and_is_sent_to_others() -> None:
    table = SharedVariable((0, 2), parameter_bytes=200, gradient_bytes=100, name="table")
    graph = unit_graph([0.0] * 3, [], shared=[table], residual_bytes=0)
    prediction = evaluate(graph, [0, 0, 1], 2, made_for(MACHINE, 1))
    assert prediction.transfer_seconds == (2.0, 3.0)
    assert prediction.cut_bytes == 300
    assert prediction.peak_bytes == (2 * 300 + 300, 300 + 300)


def test_frozen_tied_embedding_sends_no_gradient() -> None:
    table = SharedVariable((0, 1), parameter_bytes=200, gradient_bytes=0)
    graph = unit_graph([0.0] * 2, [], shared=[table])
    assert evaluate(graph, [0, 1], 2, made_for(MACHINE, 1)).transfer_seconds == (0.0, 3.0)


def test_peak_counts_residuals_and_boundary_tensors_for_each_microbatch_in_flight() -> None:
    graph = chain([1.0, 1.0], num_bytes=7)
    prediction = evaluate(graph, [0, 1], 2, made_for(MACHINE, 8, active_microbatches=3))
    assert prediction.peak_bytes == (300 + 3 * (10 + 7),) * 2


def test_sent_tensor_is_held_once_however_many_partitions_read_it() -> None:
    graph = unit_graph([0.0] * 3, [(0, (1, 2), 7)], residual_bytes=0)
    assert evaluate(graph, [0, 1, 2], 3, made_for(MACHINE, 1)).peak_bytes == (307, 307, 307)


@pytest.mark.parametrize(
    ("microbatches", "pipeline", "active", "expected"),
    [
        (8, "simple", 3, 8),
        (8, "interleaved", 3, 3),
        (2, "interleaved", 3, 2),
        (8, "interleaved", None, 4),
        (2, "interleaved", None, 2),
        (8, "zero_bubble", None, 6),
        (8, "simple", None, 8),
    ],
)
def test_in_flight_is_all_or_the_active_ones(
    microbatches: int, pipeline: str, active: int | None, expected: int
) -> None:
    assert PlanSettings(microbatches, pipeline, active).microbatches_in_flight(4) == expected


@pytest.mark.parametrize("pipeline", ["interleaved", "zero_bubble"])
@pytest.mark.parametrize("partitions", [1, 2, 3, 5])
@pytest.mark.parametrize("microbatches", [1, 3, 12])
def test_prediction_counts_no_fewer_in_flight_than_the_schedule_has(
    microbatches: int, partitions: int, pipeline: str
) -> None:
    schedule = build(pipeline, TaskGraph.chain(partitions, microbatches, split_backward=True))
    assert schedule.active_microbatches is not None
    counted = PlanSettings(microbatches, pipeline).microbatches_in_flight(partitions)
    assert schedule.active_microbatches <= counted


def test_pieces_of_a_partition_count_two_microbatches_more() -> None:
    assert PlanSettings(8, pieces=2).microbatches_in_flight(2) == 4


def test_graph_without_units_costs_nothing() -> None:
    prediction = evaluate(unit_graph([], []), [], 2, made_for(MACHINE, 4))
    assert prediction.step_seconds == 0
    assert prediction.bubble == 0
    assert prediction.balance == 1


def test_tensor_that_goes_back_is_named() -> None:
    with pytest.raises(PlanError, match="'t0' of unit 'unit0' goes from partition 1 back to 0"):
        evaluate(chain([1.0, 1.0]), [1, 0], 2, made_for(MACHINE, 1))


def test_all_tensors_that_go_back_are_counted() -> None:
    placed = [1, 0] * 8
    graph = unit_graph([1.0] * 16, [(i, (i + 1,), 1) for i in range(0, 16, 2)])
    with pytest.raises(PlanError, match="and 3 more"):
        evaluate(graph, placed, 2, made_for(MACHINE, 1))


@pytest.mark.parametrize(
    ("placed", "message"),
    [
        ([0], r"shape \(2,\); received shape \(1,\)"),
        ([0, 2], "partitions go from 0 to 1, but unit 'unit1' is in partition 2"),
        ([-1, 0], "unit 'unit0' is in partition -1"),
        ([0.0, 0.5], "received an assignment of dtype float64"),
    ],
)
def test_what_is_no_assignment_is_refused(placed: list[float], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        evaluate(chain([1.0, 1.0]), placed, 2, made_for(MACHINE, 1))


@given(unit_graphs(), MACHINES, st.integers(1, 4), st.integers(1, 8), st.data())
@settings(max_examples=60, deadline=None)
def test_whole_numbers_of_the_partitioner_agree_with_the_objective(
    graph: CoarseGraph,
    machine: Machine,
    num_partitions: int,
    microbatches: int,
    data: st.DataObject,
) -> None:
    size, problem = len(graph), problem_of(graph, num_partitions, machine, microbatches)
    used = problem.num_partitions
    partitions = st.lists(st.integers(0, used - 1), min_size=size, max_size=size)
    placed = np.array(sorted(data.draw(partitions)), dtype=np.int64)
    ticks, held = problem.loads(placed)
    prediction = evaluate(graph, placed, num_partitions, made_for(machine, microbatches))
    np.testing.assert_allclose(
        ticks * problem.seconds_per_tick, prediction.stage_seconds[:used], rtol=1e-9, atol=1e-12
    )
    assert held.tolist() == list(prediction.peak_bytes[:used])
    assert problem.score(placed).cost * problem.seconds_per_tick == pytest.approx(
        prediction.step_seconds, rel=1e-9, abs=1e-12
    )
