from __future__ import annotations

import logging
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import opensmp as smp
from opensmp.execution.profiling import advice


@pytest.fixture
def lines(caplog):
    """The warnings about microbatches."""
    with caplog.at_level(logging.WARNING, logger="opensmp"):
        yield lambda: [
            record.getMessage()
            for record in caplog.records
            if "1 microbatch" in record.getMessage()
        ]


def network(norm: bool = False) -> keras.Model:
    layers = [keras.layers.Dense(64, "tanh") for _ in range(3)]
    middle = [keras.layers.BatchNormalization(name="norm")] if norm else []
    return smp.DistributedModel.from_keras(
        keras.Sequential([keras.Input([64]), *layers, *middle, keras.layers.Dense(64)])
    )


def trained(model: keras.Model, rows: int) -> None:
    @smp.step
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x, training=True) ** 2)
        return tape.gradient(loss, model.trainable_variables)

    step(tf.ones([rows, 64]))
    step(tf.ones([2 * rows, 64]))


def test_one_microbatch_by_default_is_told_once_with_the_number_and_what_it_gives(
    smp_init, lines, monkeypatch
):
    monkeypatch.setattr(advice, "_SHORT_SECONDS", 0.0)
    smp_init({"partitions": 2})
    trained(network(), rows=48)
    trained(network(), rows=96)
    [line] = lines()
    assert "idle 50 % of the time" in line
    assert 'Add "microbatches": 8 to smp.init' in line
    assert "it divides the 48 rows of the batch" in line
    found = re.search(r"predicted bubble of (\d+) % and steps up to ([\d.]+) times as fast", line)
    bubble, gain = int(found[1]) / 100, float(found[2])
    assert 0.1 < bubble < 0.4  # that of equal partitions is 1 / 9
    assert gain == pytest.approx(2 * (1 - bubble), abs=0.06)


def test_steps_of_a_small_model_are_not_promised_to_get_faster(smp_init, lines):
    smp_init({"partitions": 2})
    trained(network(), rows=48)
    [line] = lines()
    assert "may get no faster" in line
    assert "times as fast" not in line


@pytest.mark.parametrize(
    ("rows", "number"), [(64, 16), (36, 12), (22, 11), (6, 3), (4, 2), (100, 10)]
)
def test_the_number_divides_the_rows_and_leaves_two_of_them_at_least(smp_init, lines, rows, number):
    smp_init({"partitions": 4})
    trained(network(), rows)
    [line] = lines()
    assert f'"microbatches": {number} to' in line
    assert f"divides the {rows} rows" in line


def test_rows_without_a_divisor_are_told(smp_init, lines):
    smp_init({"partitions": 2})
    trained(network(), 31)
    [line] = lines()
    assert '"microbatches": 8' in line
    assert "the 31 rows of this batch are not divisible by it" in line


def test_of_unknown_rows_it_says_what_they_must_be(smp_init, lines):
    smp_init({"partitions": 2})
    model = network()

    @smp.step(input_signature=[tf.TensorSpec([None, 64])])
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x) ** 2)
        return tape.gradient(loss, model.trainable_variables)

    step(tf.ones([4, 64]))
    [line] = lines()
    assert "the batch must be divisible by 8" in line


def test_layers_that_normalise_a_microbatch_are_named(smp_init, lines):
    smp_init({"partitions": 2})
    trained(network(norm=True), 16)
    [line] = lines()
    assert "Layer 'norm' then normalises each microbatch by itself" in line


def test_a_plan_by_hand_counts_as_equal_partitions(smp_init, lines):
    smp_init({"partitions": 2, "auto_partition": False, "default_partition": 0})
    inputs = keras.Input([64])
    with smp.partition(1):
        outputs = keras.layers.Dense(64)(inputs)
    model = smp.DistributedModel(inputs, keras.layers.Dense(64)(outputs))
    trained(model, 16)
    [line] = lines()
    assert "predicted bubble of 11 % and steps up to 1.8 times as fast" in line


def test_fit_is_told_too(smp_init, lines):
    smp_init({"partitions": 2})
    model = network()
    model.compile("sgd", "mse")
    x = np.ones([64, 64], "float32")
    model.fit(x, x, batch_size=32, verbose=0)
    model.fit(x, x, batch_size=16, verbose=0)
    assert len(lines()) == 1


@pytest.mark.parametrize(
    "config",
    [{"partitions": 2, "microbatches": 1}, {"partitions": 2, "microbatches": 2}, {"partitions": 1}],
)
def test_a_number_that_was_said_and_one_partition_are_not_told(smp_init, lines, config):
    smp_init(config)
    trained(network(), 16)
    assert lines() == []


def test_a_number_from_the_environment_was_said(smp_init, lines, monkeypatch):
    monkeypatch.setenv("OPENSMP_MICROBATCHES", "1")
    smp_init({"partitions": 2})
    trained(network(), 16)
    assert lines() == []


def test_inference_and_few_rows_are_not_told(smp_init, lines):
    smp_init({"partitions": 2})
    model = network()
    model(tf.ones([32, 64]))
    smp.step(lambda x: model(x))(tf.ones([32, 64]))
    assert lines() == []
    trained(model, 1)
    assert lines() == []
