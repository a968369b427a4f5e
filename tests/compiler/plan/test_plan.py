from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
import tensorflow as tf
from compiler.plan.hand_made import calls_of, chain, plan_of

from opensmp.compiler.plan.methods.build import make_plan, warn_of_empty
from opensmp.compiler.plan.methods.manual import manual_plan
from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.plan.unit_graph import CutTensor, SharedVariable
from opensmp.compiler.trace.layer_calls import LayerCall, Piece
from opensmp.compiler.trace.trace import trace
from opensmp.errors import PlanError


def bare(partition_of, *calls, num_partitions=4) -> Plan:
    """A plan without costs of the calls (label, operations)."""
    made = tuple(
        LayerCall(label, (Piece("operations", tuple(names)),) if names else ())
        for label, names in calls
    )
    return Plan("net", num_partitions, partition_of, made)


# --- where things are -------------------------------------------------------------------------


def test_plan_is_frozen():
    plan = plan_of(chain(2), [0, 1], 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.num_partitions = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        plan.partition_of["dense_0/MatMul"] = 1  # type: ignore[index]


def test_sizes_count_operations_and_empty_names_partitions_without_any():
    plan = plan_of(chain(3), [0, 2, 2], 4)
    assert plan.sizes == (2, 0, 4, 0)
    assert plan.empty == (1, 3)


def test_layers_name_the_outermost_layer_that_is_in_one_partition():
    plan = bare(
        {"a": 0, "b": 0, "c": 1, "d": 1, "e": 2},
        ("*", ["e"]),
        ("encoder", []),
        ("encoder/first", ["a"]),
        ("encoder/second", []),
        ("encoder/second/query", ["b"]),
        ("encoder/second/key", ["c"]),
        ("head", []),
        ("head/dense", ["d"]),
        ("dropout", []),
    )
    assert plan.layers == {
        "*": 2,
        "encoder/first": 0,
        "encoder/second/query": 0,
        "encoder/second/key": 1,
        "head": 1,
    }
    assert list(plan.layers) == [
        "*",
        "encoder/first",
        "encoder/second/query",
        "encoder/second/key",
        "head",
    ]


def test_layer_whose_own_operations_are_cut_lists_its_pieces():
    calls = (
        LayerCall("*", ()),
        LayerCall("block", (Piece("norm", ("a", "b")), Piece("add", ("c",)))),
        LayerCall("block/dense", (Piece("dense", ("d",)),)),
    )
    plan = Plan("net", 2, {"a": 0, "b": 0, "c": 1, "d": 0}, calls)
    assert plan.layers == {"block": {"norm": 0, "add": 1}, "block/dense": 0}


def test_second_call_of_a_layer_has_an_entry_of_its_own():
    plan = bare({"a": 0, "b": 1}, ("*", []), ("tower", []), ("tower/x", ["a"]), ("tower#2", ["b"]))
    assert plan.layers == {"tower": 0, "tower#2": 1}


# --- what it costs ----------------------------------------------------------------------------


def test_prediction_is_that_of_the_objective():
    plan = plan_of(chain(4), [0, 0, 1, 1], 2)
    # A stage: two units of 3 s, and one transfer of 0.5 s + 100 B / 100 B/s.
    assert plan.prediction.stage_seconds == (7.5, 7.5)
    assert plan.prediction.step_seconds == 15 + 3 * 7.5


def test_rows_add_up():
    shared = SharedVariable((0, 3), 8, 8, "tied")
    plan = plan_of(chain(4, shared=[shared]), [0, 0, 1, 1], 3)
    first, second, third = plan.rows
    assert first.layers == ("dense_0", "dense_1")
    assert (first.num_operations, second.num_operations, third.num_operations) == (4, 4, 0)
    assert (first.parameter_bytes, first.state_bytes) == (28, 48)
    assert second.parameter_bytes == 28  # a copy of the shared variable
    for row in plan.rows:
        assert row.peak_bytes == row.parameter_bytes + row.state_bytes + row.activation_bytes
    assert first.forward_flops == 2e9
    assert first.sends == {1: 108}
    assert (second.sends, third.sends) == ({}, {})
    assert first.stage_seconds == plan.prediction.stage_seconds[0]


def test_row_names_what_goes_to_several_partitions():
    graph = chain(3, tensors=[CutTensor(0, (1, 2), 100, 100, "x")])
    assert plan_of(graph, [0, 1, 2], 3).rows[0].sends == {1: 100, 2: 100}


def test_plan_without_costs_says_how_to_get_some():
    plan = bare({"a": 0}, ("*", ["a"]))
    assert str(plan) == "Plan of net over 4 partitions (0: 1 operation, 1: 0 operations, " + (
        "2: 0 operations, 3: 0 operations)"
    )
    for use in (plan.explain, plan.plot, lambda: plan.prediction, lambda: plan.rows):
        with pytest.raises(PlanError, match=r"not what they cost.*model\.plan"):
            use()


def test_costs_are_computed_once_when_somebody_asks():
    graph, made = chain(2), []

    def make_graph():
        made.append(1)
        return graph

    known = plan_of(graph, [0, 1], 2)
    plan = Plan(
        "net", 2, known.partition_of, calls_of(graph), known.settings, make_graph=make_graph
    )
    assert plan.sizes == (2, 2)
    assert not made
    assert plan.prediction == known.prediction
    assert str(plan) == str(known)
    assert made == [1]


def test_plan_that_goes_back_to_a_partition_has_costs_too():
    plan = plan_of(chain(3), [0, 1, 0], 2)
    assert plan.prediction.forward_seconds == (2, 1)
    assert [row.sends for row in plan.rows] == [{1: 100}, {0: 100}]


def test_unit_that_is_cut_by_hand_counts_for_most_of_its_operations():
    graph = dataclasses.replace(chain(2), operations=(("a", "b", "c"), ("d", "e")))
    plan = Plan("net", 2, {"a": 1, "b": 1, "c": 0, "d": 1, "e": 0}, graph=graph)
    assert plan.assignment.tolist() == [1, 0]
    assert plan.assignment.dtype == np.int64


# --- plans of traced graphs -------------------------------------------------------------------


@pytest.fixture
def traced():
    return trace(lambda x: tf.exp(x) + 1.0, (tf.zeros([2]),), {}, name="net")


def test_plan_must_cover_every_operation(traced):
    names = [op.name for op in traced.operations if op not in traced.sources]
    partition_of = dict.fromkeys(names, 0)
    assert make_plan(traced, 1, partition_of).partition_of == partition_of
    del partition_of["Exp"]
    partition_of["add"] = 7
    with pytest.raises(PlanError) as caught:
        make_plan(traced, 2, partition_of, source="auto")
    assert str(caught.value) == (
        "Plan of 'net' (auto): every operation must have a partition from 0 to 1, but 1 of 4 "
        "operations have none: Exp; 1 have one that does not exist: add (7)."
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("auto", "the model has only 1 piece that can be separated"),
        ("manual", "no operation was made in a smp.partition context of that number"),
        ("plan.json", "the plan of plan.json gives it nothing"),
    ],
)
def test_empty_partition_is_named_in_the_log_with_the_reason(source, expected, caplog):
    plan = dataclasses.replace(plan_of(chain(1), [1], 2), source=source)
    with caplog.at_level(logging.WARNING, "opensmp"):
        warn_of_empty(plan)
    (record,) = caplog.records
    assert "model 'net': partition 0 is empty" in record.message
    assert expected in record.message


def test_full_plan_logs_nothing(caplog):
    warn_of_empty(plan_of(chain(2), [0, 1], 2))
    assert not caplog.records


def test_plan_by_hand_has_one_piece_per_partition_of_a_call(traced):
    plan = manual_plan(traced, 2, default_partition=1)
    (call,) = plan.calls
    assert call.label == "*"
    assert [len(piece.operations) for piece in call.pieces] == [4]
    assert plan.layers == {"*": 1}
    assert plan.source == "manual"
