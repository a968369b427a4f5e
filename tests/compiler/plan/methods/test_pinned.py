"""Plans around variables that lie somewhere already."""

from __future__ import annotations

import logging

import keras
import pytest
import tensorflow as tf

from opensmp.compiler.plan.methods.auto import auto_plan
from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.plan.variable_placement import variable_homes
from opensmp.compiler.trace.trace import trace

NUM_LAYERS = 8
X = tf.ones([2, 8])


@pytest.fixture(scope="module")
def model():
    layers = [keras.layers.Dense(8, name=f"dense_{i}") for i in range(NUM_LAYERS)]
    model = keras.Sequential(layers)
    model(X)
    return model


def planned(model, homes, partitions=2, microbatches=4, **settings):
    traced = trace(model.__call__, [X], {}, name="chain")
    settings = PlanSettings(microbatches=microbatches, **settings)
    plan = auto_plan(traced, partitions, settings, homes)
    return plan, [plan.layers.get(f"dense_{i}") for i in range(NUM_LAYERS)], traced


def homes_of(model, places):
    return {
        id(v): place
        for index, place in places.items()
        for v in model.get_layer(f"dense_{index}").variables
    }


@pytest.mark.parametrize("optimize", ["memory", "speed"])
@pytest.mark.parametrize(
    "places",
    [{0: 0}, {0: 1}, {7: 0}, {0: 1, 7: 0}, {3: 1}, dict.fromkeys(range(4), 0), {0: 0, 4: 1, 7: 0}],
)
def test_layers_stay_where_their_variables_are(model, places, optimize):
    homes = homes_of(model, places)
    plan, found, traced = planned(model, homes, optimize=optimize)
    assert {index: found[index] for index in places} == places
    assert not plan.empty
    after = variable_homes(traced, plan, homes)
    assert all(after[key] == place for key, place in homes.items())
    # Nothing of the rest travels that need not: a layer's variables are where it runs.
    for index, place in enumerate(found):
        assert {after[id(v)] for v in model.get_layer(f"dense_{index}").variables} == {place}
    str(plan), str(plan.explain())


def test_the_rest_goes_on_after_the_kept_half(model):
    _, found, _ = planned(model, homes_of(model, dict.fromkeys(range(4), 1)), optimize="speed")
    assert found == [1] * 4 + [0] * 4


def test_what_is_kept_as_the_plan_would_have_it_changes_nothing(model):
    _, free, _ = planned(model, {})
    _, found, _ = planned(model, homes_of(model, dict(enumerate(free))))
    assert found == free


def test_four_partitions_of_which_one_is_taken(model):
    plan, found, _ = planned(model, homes_of(model, {0: 2, 1: 2}), partitions=4)
    assert found[:2] == [2, 2]
    assert not plan.empty


def test_a_slow_plan_is_told(model, caplog):
    with caplog.at_level(logging.INFO, "opensmp"):
        planned(model, homes_of(model, dict.fromkeys(range(NUM_LAYERS), 0)), microbatches=64)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "'dense_0', 'dense_1', 'dense_2', 'dense_3' and 4 more stay" in record.message
    assert "clone_model" in record.message
    caplog.clear()
    with caplog.at_level(logging.INFO, "opensmp"):
        planned(model, homes_of(model, {0: 0}))
    assert [record.levelname for record in caplog.records] == ["INFO"]
