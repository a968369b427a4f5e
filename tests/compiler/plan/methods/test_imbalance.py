from __future__ import annotations

import logging

import keras
import pytest
import tensorflow as tf

from opensmp.compiler.plan.methods.auto import auto_plan
from opensmp.compiler.plan.methods.imbalance import warn_of_imbalance
from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.trace.trace import trace


def images_and_weights():
    """Convolutions with most of the time and few weights, and a dense layer with most weights."""
    layers = [keras.layers.Conv2D(32, 9, padding="same", name=f"conv_{i}") for i in range(4)]
    return keras.Sequential(
        [keras.Input([32, 32, 3]), *layers, keras.layers.GlobalAveragePooling2D()]
        + [keras.layers.Dense(4000, name=f"dense_{i}") for i in range(3)]
    )


def one_slow_layer():
    slow = keras.layers.Conv2D(64, 9, padding="same", name="slow")
    return keras.Sequential(
        [keras.Input([32, 32, 64]), slow, keras.layers.Flatten(), keras.layers.Dense(2)]
    )


def warned(model, caplog, partitions=2, microbatches=8, **settings):
    traced = trace(model.__call__, [tf.ones([8, *model.input_shape[1:]])], {}, name="net")
    with caplog.at_level(logging.WARNING, logger="opensmp"):
        plan = auto_plan(traced, partitions, PlanSettings(microbatches, **settings))
        warn_of_imbalance(plan)
    return plan, [record.getMessage() for record in caplog.records]


def test_work_in_one_partition_is_told_with_its_layer_and_what_speed_would_give(caplog):
    plan, lines = warned(images_and_weights(), caplog)
    assert plan.prediction.balance > 1.5
    [line] = lines
    slowest = plan.prediction.stage_seconds.index(max(plan.prediction.stage_seconds))
    assert f"partition {slowest} needs {plan.prediction.balance:.1f} times the mean" in line
    assert "conv_" in line
    assert '"optimize": "speed" in smp.init gives ' in line
    assert "\n" not in line


def test_one_microbatch_has_no_balance(caplog):
    _, lines = warned(one_slow_layer(), caplog, microbatches=1)
    assert lines == []


def test_a_layer_that_no_cut_can_balance_is_named(caplog):
    plan, [line] = warned(one_slow_layer(), caplog)
    assert plan.prediction.balance > 1.5
    assert "No cut is better: 'slow" in line
    assert "fewer partitions" in line


@pytest.mark.parametrize(("partitions", "optimize"), [(2, "speed"), (1, "memory")])
def test_a_plan_for_speed_or_for_one_partition_is_not_told(caplog, partitions, optimize):
    _, lines = warned(images_and_weights(), caplog, partitions, optimize=optimize)
    assert lines == []


def test_an_even_plan_is_not_told(caplog):
    layers = [keras.layers.Dense(512, name=f"dense_{i}") for i in range(8)]
    _, lines = warned(keras.Sequential([keras.Input([512]), *layers]), caplog)
    assert lines == []
