"""Files of plans: edited by hand, cut short, of another program, or made to hurt."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from compiler.plan.hand_made import chain, plan_of
from fuzz.bounds import cases, taken
from fuzz.strategies import GREAT, MARKS, json_texts, json_values, mutated, nested, texts
from hypothesis import given
from hypothesis import strategies as st

from opensmp.compiler.plan.methods.auto import auto_plan
from opensmp.compiler.plan.methods.build import make_plan
from opensmp.compiler.plan.methods.match import fit
from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.plan.serialization.plan_file import from_json, load, to_json
from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.plan.unit_graph import SharedVariable
from opensmp.compiler.trace.layer_calls import LayerCall, Piece
from opensmp.compiler.trace.trace import trace

CUT = Plan(
    "net",
    3,
    {"a": 0, "b": 0, "c": 0, "d": 1, "e": 1, "out": 1},
    (
        LayerCall("*", (Piece("output", ("out",)),)),
        LayerCall("first", (Piece("first", ("a", "b")),)),
        LayerCall("second", (Piece("norm", ("c",)), Piece("add", ("e",)))),
        LayerCall("second/dense", (Piece("dense", ("d",)),)),
    ),
)
SHARED = chain(4, shared=[SharedVariable((0, 3), 8, 8, "tied")])
RIGHT = tuple(
    json.loads(json.dumps(to_json(plan)))
    for plan in (
        CUT,
        plan_of(chain(3), [0, 0, 1], 2),
        plan_of(SHARED, [0, 0, 1, 1], 2, memory_bytes=2**30, optimize="speed", pieces=2),
    )
)
DATA = mutated(st.sampled_from(RIGHT))


def checked(result: Any) -> None:
    """What is taken can be looked at, written and read again."""
    if result.error is not None:
        return
    plan: Plan = result.value
    again = taken(lambda: from_json(json.loads(json.dumps(to_json(plan)))))
    assert again.error is None
    assert again.value.partition_of == plan.partition_of
    assert again.value.layers == plan.layers
    if plan.num_partitions > 50 or (plan.has_costs and len(plan.costs.tensors) > 1000):
        return  # a table of that many rows, and the costs of so many tensors, take their time
    assert taken(lambda: str(plan)).value
    if plan.has_costs:
        prediction = plan.prediction
        assert np.isfinite(prediction.step_seconds)
        assert min(prediction.peak_bytes) >= 0
        assert taken(lambda: str(plan.explain())).value


@cases()
@given(data=DATA)
def test_values_of_a_plan_are_taken_or_refused(data):
    checked(taken(lambda: from_json(data, "plan.json")))


@cases()
@given(text=json_texts(DATA))
def test_files_of_plans_are_taken_or_refused(text, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    checked(taken(lambda: load(path)))


@cases()
@given(
    part=st.sampled_from(("layers", "settings", "costs", "operations", "machine")),
    base=st.sampled_from(RIGHT[1:]),
    draw=st.data(),
)
def test_parts_of_a_plan_are_taken_or_refused(part, base, draw):
    """Only one part is odd: no other fault hides what it does."""
    data = json.loads(json.dumps(base))
    holder = data["settings"] if part == "machine" else data
    holder[part] = draw.draw(mutated(st.just(holder[part])))
    checked(taken(lambda: from_json(data, "plan.json")))


@st.composite
def great_plans(draw: st.DrawFn) -> Any:
    """Plans of which one part is very long or deep, and small as text."""
    data = json.loads(json.dumps(draw(st.sampled_from(RIGHT[1:]))))
    count = draw(st.sampled_from(GREAT)) // 4
    name = draw(st.sampled_from(("a", "a/", "_1", "#1", "/")))
    kind = draw(st.integers(0, 9))
    if kind == 0:
        data["operations"][name * count] = {"x": ["new"]}
    elif kind == 1:
        data["operations"].update({f"{name}{i}": {"x": [f"n{i}"]} for i in range(count // 4)})
    elif kind == 2:
        data["layers"].update({f"{name}{i}": 0 for i in range(count // 4)})
    elif kind == 3:
        data["costs"]["operations"][0] = [[0, 5]] * count
    elif kind == 4:
        data["costs"]["operations"][0] = [[draw(st.sampled_from((0, -(10**9)))), 10**12]]
    elif kind == 5:
        data["partitions"] = draw(st.sampled_from((10**5, 10**9, 10**30)))
    elif kind == 6:
        data["costs"]["tensors"] = data["costs"]["tensors"][:1] * count
    elif kind == 7:
        data["settings"]["microbatches"] = data["settings"]["active_microbatches"] = 10**6
        data["costs"]["residual_bytes"] = [2**50] * len(data["costs"]["names"])
    elif kind == 8:
        label = "/".join(["a"] * min(count, 5000))
        data["operations"][label] = {"x": ["new"]}
        data["layers"][label] = 0
    else:
        data[draw(st.sampled_from(sorted(data)))] = nested(count)
    return data


@cases(one_in=4)
@given(data=great_plans())
def test_great_plans_are_taken_or_refused(data):
    checked(taken(lambda: from_json(data, "plan.json")))


@cases()
@given(path=texts("plan.json") | st.sampled_from((".", "/dev/zero", "/dev/null", "/proc/self/mem")))
def test_paths_of_plans_are_taken_or_refused(path):
    assert taken(lambda: Plan.load(path)).error is not None or Path(path).is_file()


@cases()
@given(data=json_values() | st.sampled_from(tuple(MARKS)))
def test_values_of_something_else_are_refused(data):
    assert taken(lambda: from_json(data, "plan.json")).error is not None


@functools.cache
def traced_model() -> Any:
    inputs = keras.Input([8])
    x = inputs
    for _ in range(3):
        x = keras.layers.Dropout(0.5)(keras.layers.Dense(8, activation="relu")(x))
    model = keras.Model(inputs, x, name="mlp")
    traced = trace(model, (tf.zeros([4, 8]),), {"training": True}, name=model.name)
    plan = make_plan(
        traced,
        2,
        {
            op.name: int(index % 2)
            for index, op in enumerate(op for op in traced.operations if op not in traced.sources)
        },
        settings=PlanSettings(microbatches=2),
    )
    return traced, [json.loads(json.dumps(to_json(p))) for p in (plan, auto_plan(traced, 2))]


@cases()
@given(draw=st.data())
def test_plans_fit_a_model_or_are_refused(draw):
    traced, right = traced_model()
    data = draw.draw(st.sampled_from(right))
    data = {**data, "costs": None}
    del data["costs"]
    part = draw.draw(st.sampled_from(("operations", "layers", "partitions")))
    data[part] = draw.draw(mutated(st.just(data[part]), json_values(0, 1, "*", "dense", "mlp")))
    result = taken(lambda: from_json(data, "plan.json"))
    if result.error is None:
        fitted = taken(lambda: fit(result.value, traced, 2, PlanSettings(microbatches=2)))
        if fitted.error is None:
            assert set(fitted.value.partition_of.values()) <= {0, 1}
