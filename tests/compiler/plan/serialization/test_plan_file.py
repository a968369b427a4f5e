from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from compiler.plan.hand_made import chain, plan_of
from hypothesis import given
from hypothesis import strategies as st

from opensmp.base.message_text import shown
from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.plan.serialization.plan_file import from_json, to_json
from opensmp.compiler.plan.unit_graph import SharedVariable
from opensmp.compiler.trace.layer_calls import LayerCall, Piece
from opensmp.errors import PlanError


def nested() -> Plan:
    """A plan of two blocks, the second of them cut, without costs."""
    calls = (
        LayerCall("*", (Piece("output", ("out",)),)),
        LayerCall("first", (Piece("first", ("a", "b")),)),
        LayerCall("second", (Piece("norm", ("c",)), Piece("add", ("e",)))),
        LayerCall("second/dense", (Piece("dense", ("d",)),)),
    )
    return Plan("net", 3, {"a": 0, "b": 0, "c": 0, "d": 1, "e": 1, "out": 1}, calls)


def edited(plan: Plan, layers: dict[str, Any]) -> Plan:
    """The plan after an edit of its file's `layers`."""
    data = json.loads(json.dumps(to_json(plan)))
    data["layers"] = layers
    return from_json(data, "plan.json")


# --- there and back ---------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=6),
    st.sampled_from([None, 2**30]),
    st.sampled_from(["memory", "speed"]),
)
def test_plan_comes_back_as_it_was(assignment, memory_bytes, optimize):
    shared = [SharedVariable((0, len(assignment) - 1), 8, 8, "tied")]
    graph = chain(len(assignment), shared=shared)
    plan = plan_of(graph, assignment, 3, memory_bytes=memory_bytes, optimize=optimize)
    again = from_json(json.loads(json.dumps(to_json(plan))))
    assert again.partition_of == plan.partition_of
    assert (again.model, again.num_partitions) == ("net", 3)
    assert (again.calls, again.settings, again.layers) == (plan.calls, plan.settings, plan.layers)
    assert again.prediction == plan.prediction
    assert again.costs.operations == graph.operations
    assert again.costs.tensors == graph.tensors
    assert again.costs.shared == graph.shared
    assert np.array_equal(again.costs.residual_bytes, graph.residual_bytes)


def test_file_is_readable_and_loads(tmp_path):
    path = tmp_path / "plan.json"
    plan = plan_of(chain(3), [0, 0, 1], 2)
    plan.save(path)
    text = path.read_text()
    assert '    "dense_0": 0,\n    "dense_1": 0,\n    "dense_2": 1\n' in text
    again = Plan.load(path)
    assert again.source == str(path)
    assert str(again) == str(plan)
    assert str(again.explain()) == str(plan.explain())


def test_plan_without_costs_comes_back_without_them(tmp_path):
    nested().save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.partition_of == nested().partition_of
    assert not plan.has_costs


def test_seconds_are_written_exactly():
    plan = plan_of(chain(2, forward=[math.pi / 1e3, 1 / 3]), [0, 1], 2)
    again = from_json(json.loads(json.dumps(to_json(plan))))
    assert again.costs.forward_seconds.tolist() == [math.pi / 1e3, 1 / 3]


def test_same_plan_gives_the_same_file(tmp_path):
    for name in ("one", "two"):
        plan_of(chain(5), [0, 0, 1, 1, 2], 3).save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


# --- editing ----------------------------------------------------------------------------------


def test_unedited_layers_say_all():
    assert nested().layers == {
        "*": 1,
        "first": 0,
        "second": {"norm": 0, "add": 1},
        "second/dense": 1,
    }
    assert edited(nested(), dict(nested().layers)).partition_of == nested().partition_of


def test_edited_layer_moves_with_all_inside_it():
    plan = edited(nested(), {"*": 1, "first": 2, "second": 2})
    assert plan.partition_of == {"a": 2, "b": 2, "c": 2, "d": 2, "e": 2, "out": 1}
    assert plan.layers == {"*": 1, "first": 2, "second": 2}


def test_innermost_entry_counts():
    plan = edited(nested(), {"*": 0, "second": 1, "second/dense": 2})
    assert plan.partition_of == {"a": 0, "b": 0, "c": 1, "d": 2, "e": 1, "out": 0}


def test_piece_counts_before_its_layer():
    plan = edited(nested(), {"*": 0, "second": {"add": 2}, "second/dense": 1})
    assert plan.partition_of == {"a": 0, "b": 0, "c": 0, "d": 1, "e": 2, "out": 0}


def test_star_is_for_all_that_has_no_other_entry():
    assert set(edited(nested(), {"*": 2}).partition_of.values()) == {2}


def test_edited_plan_has_the_costs_of_where_things_are_now():
    plan = plan_of(chain(4), [0, 0, 1, 1], 2)
    moved = edited(plan, {**plan.layers, "dense_1": 1})
    assert moved.prediction == plan_of(chain(4), [0, 1, 1, 1], 2).prediction


# --- faults -----------------------------------------------------------------------------------


def broken(**changes: Any) -> str:
    """The message that a plan's file gets after such changes; None takes a part out."""
    data = json.loads(json.dumps(to_json(plan_of(chain(3), [0, 0, 1], 2))))
    for key, value in changes.items():
        if value is None:
            del data[key]
        else:
            data[key] = value
    with pytest.raises(PlanError) as caught:
        from_json(data, "plan.json")
    return str(caught.value)


MISUSES = [
    ({"format": "tar"}, ["'plan.json' is no plan", '"format": "opensmp plan"', "'tar'"]),
    ({"version": 9}, ["version 9", "reads version 1"]),
    ({"model": 3}, ["1. model: expected a text; received 3"]),
    ({"partitions": None}, ["partitions: expected an integer; it is missing"]),
    ({"partitions": True}, ["partitions: expected an integer; received True"]),
    ({"partitions": 0}, ["partitions: received 0; expected an integer >= 1"]),
    ({"layers": None}, ["layers: expected an object; it is missing"]),
    (
        {"layers": {"*": 0, "dense_9": 1}},
        ["layers: 'dense_9' is no layer of the plan; did you mean 'dense_"],
    ),
    ({"layers": {"*": 2}}, ["'*' has partition 2; expected an integer from 0 to 1"]),
    ({"layers": {"*": "0"}}, ["'*' has partition '0'; expected an integer"]),
    ({"layers": {"*": True}}, ["'*' has partition True"]),
    (
        {"layers": {"*": 0, "dense_0": {"dens_0": 1}}},
        ["'dense_0', piece 'dens_0', is no piece of that layer; did you mean 'dense_0'?"],
    ),
    (
        {"layers": {"dense_0": 0}},
        ["2 faults", "no entry contains the operations of 'dense_1'", "'dense_2'", '"*"'],
    ),
    ({"operations": {"*": 3}}, ["operations: expected an object of lists of names for '*'"]),
    (
        {"operations": {"a": {"x": ["op"]}, "b": {"y": ["op"]}}},
        ["operations: 'op' is in 'a' and in 'b'"],
    ),
    ({"settings": {"speed": 3}}, ["settings: expected an object with microbatches, pipeline"]),
    ({"costs": {"names": 3}}, ["costs: this part is broken; take it out"]),
]


@pytest.mark.parametrize(("changes", "parts"), MISUSES, ids=lambda value: str(value)[:50])
def test_broken_file_gets_a_message_that_says(changes, parts):
    message = broken(**changes)
    for part in (*parts, "plan.json"):
        assert part in message
    assert "opensmp plan" in message  # how to mend it


def test_all_faults_come_at_once():
    message = broken(model=None, partitions="2", settings=None)
    assert "has 3 faults." in message
    for number, key in enumerate(("model", "partitions", "settings"), start=1):
        assert f"  {number}. {key}: " in message


def test_no_file_is_named(tmp_path):
    with pytest.raises(PlanError, match=r"absent\.json' cannot be read: No such file"):
        Plan.load(tmp_path / "absent.json")


def test_file_that_is_no_json_says_where(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text('{"format": "opensmp plan",\n  broken')
    with pytest.raises(PlanError, match=r"is no JSON: .* in line 2, column 3"):
        Plan.load(path)


def test_binary_file_is_refused(tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="cannot be read: it is not UTF-8"):
        Plan.load(path)


def test_json_of_something_else_is_refused():
    with pytest.raises(PlanError, match="received 'list'"):
        from_json([1, 2], "plan.json")


# --- what nobody writes by hand -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "too many digits"),
        ('{"format": "opensmp plan", "version": 1, "version": 1}', "'version' comes twice"),
        ('{"partitions": NaN}', "NaN is no JSON number"),
    ],
    ids=shown,
)
def test_file_that_python_reads_otherwise_is_refused(text, part, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError) as caught:
        Plan.load(path)
    assert part in str(caught.value)


@pytest.mark.parametrize("path", ["a\0b", "a" * 5000, ".", "/dev/zero", ""], ids=shown)
def test_path_of_no_file_is_refused(path):
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.load(path)


def test_file_that_is_larger_than_any_plan_is_not_read(tmp_path):
    path = tmp_path / "plan.json"
    with path.open("wb") as file:
        file.truncate(2**40)  # holds nothing on the disk
    with pytest.raises(PlanError, match="more than a plan has"):
        Plan.load(path)


@pytest.mark.parametrize("version", [True, 1.0, "1", [1], 10**5000], ids=shown)
def test_version_of_another_type_is_another_version(version):
    assert "reads version 1" in broken(version=version)


@pytest.mark.parametrize("partitions", [10**9, 10**5000], ids=shown)
def test_partitions_beyond_all_bounds_are_refused(partitions):
    assert "expected an integer >= 1 and <= 100000" in broken(partitions=partitions)


def test_operation_that_comes_twice_is_named():
    assert "'op' is in 'a' and in 'a'" in broken(operations={"a": {"x": ["op"], "y": ["op"]}})


@pytest.mark.parametrize("label", ["", "/", "a//b", "a/"])
def test_layers_without_a_name_are_refused(label):
    assert "the name of a layer is empty" in broken(operations={label: {"x": ["op"]}})


@pytest.mark.parametrize("label", ["a/" * 1000, "a" * 100_000], ids=shown)
def test_label_that_no_layer_has_is_refused(label):
    assert "no layer is nested as deeply as" in broken(operations={label: {"x": ["op"]}})


def test_of_very_many_faults_the_first_are_listed():
    message = broken(layers={f"dense_{number}x": 0 for number in range(20_000)})
    assert "has 20000 faults" in message
    assert "and 19950 more." in message
    assert len(message) < 20_000
