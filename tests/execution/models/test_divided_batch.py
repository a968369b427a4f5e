"""What the user is told of models for which microbatches make a difference."""

from __future__ import annotations

import logging

import keras
import numpy as np
import pytest
import tensorflow as tf

import opensmp as smp
from opensmp.errors import StepError

FOUR = {"partitions": 2, "microbatches": 4}
ONE = {"partitions": 2, "microbatches": 1}
layers = keras.layers


class Codebook(layers.Layer):
    """Assigns a moving average of its input in `call`."""

    def build(self, shape):
        self.codes = self.add_weight(shape=(shape[-1],), trainable=False, name="codes")

    def call(self, x):
        self.codes.assign(0.9 * self.codes + 0.1 * keras.ops.mean(x, 0))
        return x + self.codes


class Measuring(layers.Layer):
    """Updates a metric."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = keras.metrics.Mean()

    def call(self, x):
        self.mean.update_state(x)
        return x


class Reshaped(keras.Model):
    """Counts on batches of 8 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.top = layers.Dense(6), layers.Dense(1)

    def call(self, x):
        return self.top(tf.reshape(self.hidden(x), (8, 6)))


def stack(*middle: layers.Layer, shape: tuple = (None, 4)) -> keras.Model:
    return keras.Sequential([keras.Input(batch_shape=shape), *middle, layers.Dense(1)])


def rows(*shape: int) -> np.ndarray:
    return np.ones(shape, "float32")


def by_fit(model: keras.Model, x: np.ndarray, batch_size: int = 8) -> None:
    view = smp.DistributedModel.from_keras(model)
    view.compile("sgd", "mse")
    view.fit(x, rows(len(x), 1), batch_size=batch_size, epochs=2, verbose=0)


def by_step(model: keras.Model, x: np.ndarray) -> None:
    view = smp.DistributedModel.from_keras(model)

    @smp.step
    def step(x):
        return tf.reduce_mean(view(x, training=True))

    step(x)
    step(x)


def by_call(model: keras.Model, x: np.ndarray) -> None:
    smp.DistributedModel.from_keras(model)(x)


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, "opensmp")
    return lambda: [r.getMessage() for r in caplog.records if "what it keeps" in r.getMessage()]


class TestState:
    @pytest.mark.parametrize("run", [by_fit, by_step])
    def test_a_stateful_layer_is_named_once(self, run, warnings, smp_init):
        smp_init(FOUR)
        run(stack(layers.LSTM(5, stateful=True, name="memory"), shape=(2, 3, 4)), rows(8, 3, 4))
        (message,) = warnings()
        assert message.count("layer 'memory' is stateful") == 1
        assert "split into 4 microbatches" in message
        assert '{"microbatches": 1}' in message

    @pytest.mark.parametrize("run", [by_fit, by_step])
    def test_a_variable_that_is_assigned_in_a_call_is_named_once(self, run, warnings, smp_init):
        smp_init(FOUR)
        run(stack(Codebook(name="quantizer")), rows(8, 4))
        (message,) = warnings()
        assert "/quantizer/codes' is assigned once per microbatch" in message

    def test_also_one_of_tensorflow_and_inside_of_other_layers(self, warnings, smp_init):
        smp_init(FOUR)
        count = tf.Variable(0.0, trainable=False, name="count")

        class Counting(layers.Layer):
            def call(self, x):
                count.assign_add(1.0)
                return x

        by_step(stack(keras.Sequential([Counting(), Codebook(name="inner")])), rows(8, 4))
        (message,) = warnings()
        assert "variable 'count:0'" in message
        assert "/inner/codes'" in message

    @pytest.mark.parametrize(
        "layer",
        [
            layers.BatchNormalization,
            lambda: layers.Dropout(0.5),
            lambda: layers.SpectralNormalization(layers.Dense(3)),
            Measuring,
            lambda: layers.Dense(3),
        ],
        ids=["statistics", "seed", "norm", "metric", "nothing"],
    )
    def test_what_is_so_by_design_is_not_named(self, layer, warnings, smp_init):
        smp_init(FOUR)
        by_step(stack(layer()), rows(8, 4))
        assert not warnings()

    @pytest.mark.parametrize("run", [by_fit, by_step, by_call])
    def test_one_microbatch_makes_no_difference(self, run, warnings, smp_init):
        smp_init(FOUR if run is by_call else ONE)
        run(stack(Codebook()), rows(8, 4))
        assert not warnings()


class TestRows:
    @pytest.mark.parametrize("run", [by_fit, by_step])
    @pytest.mark.parametrize("kind", ["state", "reshape"])
    def test_a_model_for_the_rows_of_a_batch_is_told_those_of_a_microbatch(
        self, run, kind, smp_init
    ):
        smp_init(FOUR)
        if kind == "state":
            model = stack(layers.LSTM(5, stateful=True), shape=(8, 3, 4))
            x = rows(8, 3, 4)
        else:
            model, x = Reshaped(), rows(8, 4)
        with pytest.raises(
            StepError, match="cannot be called with a microbatch, which has 2 rows"
        ) as error:
            run(model, x)
        assert error.match("split into 4 microbatches")
        assert error.match(r"batch_shape=\(2, \.\.\.\)")
        assert error.match("batch size: 8" if kind == "state" else "Cannot reshape")

    def test_a_batch_that_is_not_divided_evenly(self, smp_init):
        smp_init({"partitions": 2, "microbatches": 3})
        with pytest.raises(StepError, match="which has 2 rows: a batch is split into 3"):
            by_fit(Reshaped(), rows(8, 4))

    @pytest.mark.parametrize("run", [by_fit, by_step])
    def test_the_batch_size_of_an_input_alone_does_not_matter(self, run, smp_init):
        smp_init(FOUR)
        run(stack(shape=(8, 4)), rows(8, 4))

    def test_one_microbatch_is_a_batch(self, smp_init):
        smp_init(ONE)
        by_fit(Reshaped(), rows(8, 4))
        with pytest.raises(ValueError, match="Cannot reshape") as error:
            by_fit(Reshaped(), rows(4, 4), batch_size=4)
        assert "microbatch" not in str(error.value)

    def test_other_errors_stay_as_they_are(self, smp_init):
        smp_init(FOUR)

        class Wrong(Reshaped):
            def call(self, x):
                return self.top(tf.reshape(self.hidden(x), (-1, 5)))

        with pytest.raises(ValueError, match="evenly divisible") as error:
            by_fit(Wrong(), rows(8, 4))
        assert not isinstance(error.value, StepError)
