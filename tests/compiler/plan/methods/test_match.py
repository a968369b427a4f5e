from __future__ import annotations

import logging

import keras
import pytest
import tensorflow as tf
from keras import layers

from opensmp.compiler.plan.methods.auto import auto_plan
from opensmp.compiler.plan.methods.build import make_plan
from opensmp.compiler.plan.methods.match import fit, follow
from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.plan.serialization.plan_file import from_json, to_json
from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.trace.trace import trace
from opensmp.errors import PlanError

SETTINGS = PlanSettings(microbatches=2)


def mlp(num_layers: int = 4, name: str = "mlp") -> keras.Model:
    inputs = keras.Input([8])
    x = inputs
    for _ in range(num_layers):
        x = layers.Dense(8, activation="relu")(x)
        x = layers.Dropout(0.5)(x)
    return keras.Model(inputs, x, name=name)


def traced_call(model: keras.Model, batch: int = 4, training: bool = True):
    return trace(model, (tf.zeros([batch, 8]),), {"training": training}, name=model.name)


def stored(plan: Plan) -> Plan:
    """The plan after a way through its file."""
    return from_json(to_json(plan), "plan.json")


class Raw(keras.Model):
    """No layers inside: all operations are the model's own."""

    def __init__(self, num_products: int = 6):
        super().__init__(name="raw")
        self.kernels = [self.add_weight(shape=(8, 8)) for _ in range(num_products)]

    def call(self, x, training=None):
        for kernel in self.kernels:
            x = tf.nn.relu(tf.linalg.matmul(x, kernel))
            if training:
                x = tf.nn.dropout(x, 0.1)
        return x


def test_plan_fits_the_model_it_was_made_for():
    traced = traced_call(mlp())
    plan = auto_plan(traced, 2, SETTINGS)
    assert plan.sizes[0] > 0
    assert plan.sizes[1] > 0
    again = fit(stored(plan), traced, 2, SETTINGS)
    assert again.partition_of == plan.partition_of
    assert again.layers == plan.layers
    assert again.source == "plan.json"
    assert again.prediction == plan.prediction


def test_plan_fits_though_keras_numbers_the_layers_otherwise():
    plan = auto_plan(traced_call(mlp()), 2, SETTINGS)
    traced = traced_call(mlp())  # dense_4 ... in the place of dense ...
    again = fit(stored(plan), traced, 2, SETTINGS)
    assert again.partition_of != plan.partition_of
    assert list(again.layers.values()) == list(plan.layers.values())


@pytest.mark.parametrize("training", [True, False])
def test_plan_of_training_fits_inference_and_other_shapes(training):
    model = mlp()
    plan = auto_plan(traced_call(model, training=not training), 3, SETTINGS)
    traced = traced_call(model, batch=7, training=training)
    again = fit(stored(plan), traced, 3, SETTINGS)
    dense = [label for label in plan.layers if label.startswith("dense")]
    assert [again.layers[label] for label in dense] == [plan.layers[label] for label in dense]


def test_layer_that_is_cut_inside_is_recognised_by_its_operations():
    model = Raw()
    plan = auto_plan(trace(model, (tf.zeros([4, 8]),), {"training": True}, name="raw"), 3, SETTINGS)
    assert set(plan.layers) == {"*"}
    traced = trace(model, (tf.zeros([2, 8]),), {"training": False}, name="raw")
    again = fit(stored(plan), traced, 3, SETTINGS)

    def products(p):
        return [part for name, part in p.partition_of.items() if "MatMul" in name]

    assert products(again) == products(plan)
    assert set(products(plan)) == {0, 1, 2}


def test_other_number_of_partitions_is_refused():
    plan = auto_plan(traced_call(mlp()), 2, SETTINGS)
    with pytest.raises(PlanError) as caught:
        fit(stored(plan), traced_call(mlp()), 4, SETTINGS)
    assert str(caught.value) == (
        "Plan of 'mlp' (plan.json): it has 2 partitions, but the configuration has 4. Set "
        "'partitions': 2, or make a plan for 4 with `opensmp plan ... --partitions 4`."
    )


def test_other_model_is_refused_with_the_first_difference_and_counts():
    plan = auto_plan(traced_call(mlp(3)), 2, SETTINGS)
    inputs = keras.Input([8])
    x = layers.Dense(8, name="start")(inputs)
    x = layers.LayerNormalization(name="norm")(x)
    other = keras.Model(inputs, layers.Dense(8, name="head")(x), name="other")
    with pytest.raises(PlanError) as caught:
        fit(stored(plan), traced_call(other), 2, SETTINGS)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith(
        "Plan of 'mlp' (plan.json): it does not fit model 'other': it knows 6 layer calls with "
    )
    assert "the model has 3 with " in first
    assert "First difference, at call 1: the plan has 'dense" in lines[0]
    assert "the model has 'start'" in lines[0]
    assert "Only in the plan (6): " in lines[1]
    assert lines[1].endswith(" and 2 more.")
    assert "Only in the model (3): 'start', 'norm', 'head'." in lines[2]
    assert "model.plan.save(path)" in lines[3]


def test_model_that_is_longer_is_refused():
    plan = auto_plan(traced_call(mlp(2)), 2, SETTINGS)
    with pytest.raises(PlanError, match=r"at call 5: the plan has no more, the model has 'dense"):
        fit(stored(plan), traced_call(mlp(3)), 2, SETTINGS)


@pytest.mark.parametrize("width", [8, 9])
def test_plan_that_was_made_for_other_sizes_is_used_with_a_warning(width, caplog):
    def model(width):
        inputs = keras.Input([8])
        x = layers.Dense(width)(layers.Dropout(0.1)(inputs))
        return keras.Model(inputs, layers.Dense(8)(x), name="net")

    plan = auto_plan(traced_call(model(8)), 2, SETTINGS)
    with caplog.at_level(logging.WARNING, "opensmp"):
        fit(stored(plan), traced_call(model(width)), 2, SETTINGS)
    messages = [record.message.split(". It")[0] for record in caplog.records]
    expected = "Plan of 'net' (plan.json): it was made for 576 B of variables, model 'net' has "
    assert messages == ([f"{expected}{4 * (8 * 9 + 9 + 9 * 8 + 8)} B"] if width == 9 else [])


def test_other_operations_in_a_layer_that_is_cut_are_refused():
    plan = auto_plan(trace(Raw(), (tf.zeros([4, 8]),), {}, name="raw"), 2, SETTINGS)

    class Other(keras.Model):
        def call(self, x):
            for _ in range(12):
                x = tf.sin(tf.cos(x))
            return x

    traced = trace(Other(name="raw"), (tf.zeros([4, 8]),), {}, name="raw")
    with pytest.raises(PlanError, match="consist of other operations: the model's own operations"):
        fit(stored(plan), traced, 2, SETTINGS)


# --- second traces ----------------------------------------------------------------------------


def test_second_trace_keeps_the_places_of_the_first():
    model = mlp()
    first = traced_call(model, training=False)
    names = [op.name for op in first.operations if op not in first.sources]
    # A plan nobody would make: every operation of a layer call, calls dealt out in turn.
    by_layer = {name.split("/")[1] if "/" in name else "": None for name in names}
    number = {layer: i % 3 for i, layer in enumerate(by_layer)}
    plan = make_plan(
        first, 3, {n: number[n.split("/")[1] if "/" in n else ""] for n in names}, source="auto"
    )
    again = follow(traced_call(model, batch=9, training=True), [plan], SETTINGS)
    assert {k: v for k, v in again.layers.items() if k.startswith("dense")} == {
        k: v for k, v in plan.layers.items() if k.startswith("dense")
    }


def test_what_is_new_goes_with_what_comes_before():
    model = mlp()
    plan = auto_plan(traced_call(model, training=False), 2, SETTINGS)
    again = follow(traced_call(model, training=True), [plan], SETTINGS)
    place = None
    for label, partition in again.layers.items():
        if label.startswith("dense"):
            place = partition
        elif label.startswith("dropout"):
            assert partition == place


def test_earlier_of_two_plans_counts():
    model = mlp(2)
    traced = traced_call(model)
    names = [op.name for op in traced.operations if op not in traced.sources]
    first, second = (make_plan(traced, 2, dict.fromkeys(names, p)) for p in (0, 1))
    assert set(follow(traced, [first, second], SETTINGS).partition_of.values()) == {0}


def test_layers_that_only_the_second_trace_has_follow_later():
    class Switch(keras.Model):
        def __init__(self):
            super().__init__(name="switch")
            self.always, self.extra = layers.Dense(8), layers.Dense(8)

        def call(self, x, training=None):
            x = self.always(x)
            return self.extra(x) if training else x

    model = Switch()
    plans = [auto_plan(traced_call(model, training=False), 2, SETTINGS)]
    plans.append(follow(traced_call(model, training=True), plans, SETTINGS))
    third = follow(traced_call(model, batch=5, training=True), plans, SETTINGS)
    assert third.layers == plans[1].layers
