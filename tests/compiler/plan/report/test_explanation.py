from __future__ import annotations

import pytest
from compiler.plan.hand_made import chain, plan_of

from opensmp.compiler.plan.report.explanation import explain
from opensmp.compiler.plan.unit_graph import CutTensor


def test_each_cut_names_what_is_beside_it_and_what_passes():
    explanation = explain(plan_of(chain(6), [0, 0, 1, 1, 2, 2], 3))
    assert [(cut.before, cut.after) for cut in explanation.cuts] == [(0, 1), (1, 2)]
    first, second = explanation.cuts
    assert (first.last, first.first) == ("dense_1", "dense_2")
    assert (second.last, second.first) == ("dense_3", "dense_4")
    assert [tensor.name for tensor in first.tensors] == ["t1"]


def test_tensor_that_skips_a_partition_passes_both_cuts():
    tensors = [CutTensor(0, (1, 2), 100, 100, "skip"), CutTensor(1, (2,), 300, 0, "next")]
    explanation = explain(plan_of(chain(3, tensors=tensors), [0, 1, 2], 3))
    passing = [[tensor.name for tensor in cut.tensors] for cut in explanation.cuts]
    assert passing == [["skip"], ["next", "skip"]]


def test_moves_cost_what_the_moved_plan_costs():
    plan = plan_of(chain(4), [0, 0, 1, 1], 2)
    (cut,) = explain(plan).cuts
    costs = {(move.layers, move.target): move.prediction for move in cut.moves}
    assert costs == {
        (("dense_1",), 1): plan_of(chain(4), [0, 1, 1, 1], 2).prediction,
        (("dense_2",), 0): plan_of(chain(4), [0, 0, 0, 1], 2).prediction,
    }


def test_layer_moves_as_a_whole():
    layers = ["a", "b", "b", "c", "c", "d"]
    (cut,) = explain(plan_of(chain(6, layers=layers), [0, 0, 0, 1, 1, 1], 2)).cuts
    assert {(move.units, move.target) for move in cut.moves} == {((1, 2), 1), ((3, 4), 0)}


def test_best_plan_has_no_better_neighbour_and_a_poor_one_has():
    good = plan_of(chain(4), [0, 0, 1, 1], 2, optimize="speed")
    poor = plan_of(chain(4), [0, 1, 1, 1], 2, optimize="speed")
    assert explain(good).better == ()
    (better,) = explain(poor).better[:1]
    assert better.layers == ("dense_1",)
    assert better.prediction.step_seconds < poor.prediction.step_seconds
    assert "BETTER" in str(explain(poor))
    assert "BETTER" not in str(explain(good))


@pytest.mark.parametrize("optimize", ["memory", "speed"])
def test_moves_are_ordered_by_what_the_plan_makes_small(optimize):
    plan = plan_of(chain(6, forward=[1, 1, 1, 1, 1, 5]), [0, 0, 0, 1, 1, 1], 2, optimize=optimize)
    (cut,) = explain(plan).cuts
    aims = [(max(m.prediction.peak_bytes), m.prediction.step_seconds) for m in cut.moves]
    if optimize == "speed":
        aims = [(seconds, peak) for peak, seconds in aims]
    assert aims == sorted(aims)
    assert {(move.source, move.target) for move in cut.moves} == {(0, 1), (1, 0)}


def test_what_is_left_of_a_block_is_moved_as_well():
    layers = ["in", "block_1/a", "block_1/b", "block_2/a", "block_2/b", "out"]
    (cut,) = explain(plan_of(chain(6, layers=layers), [0, 0, 0, 1, 1, 1], 2)).cuts
    moved = {(move.layers, move.target) for move in cut.moves}
    assert (("block_1/a", "block_1/b"), 1) in moved
    assert (("block_2/a", "block_2/b"), 0) in moved


def test_text_says_why_here_and_what_else():
    text = str(plan_of(chain(4), [0, 0, 1, 1], 3, memory_bytes=2**20).explain())
    for part in (
        "Plan of net over 3 partitions: 4 microbatches, pipeline 'interleaved'",
        "Step: 37.5 s = all stages 15 s + 3 x the slowest, partition 0, 7.5 s",
        "the limit is 1 MiB",
        "The cuts make peak memory small, then step time (optimize='memory').",
        "Partition 2 is empty.",
        "Cut 0 | 1, between 'dense_1' and 'dense_2':",
        "1 tensor passes it per microbatch, 100 B forward and 100 B backward.",
        "if 'dense_1' went to partition 1: step 46.5 s (+24.0 %), memory",
    ):
        assert part in text


def test_single_partition_has_no_cut():
    assert "There is no cut" in str(plan_of(chain(2), [0, 0], 1).explain())
