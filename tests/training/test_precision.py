"""Mixed precision and other number types: as plain Keras computes them."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from training.fixtures import BY_TWO, assert_close, assert_same, data

import opensmp as smp

ROWS, PARTS, STEPS = 8, 4, 6


@pytest.fixture(autouse=True)
def _two_partitions(smp_init):
    smp_init(BY_TWO)


@pytest.fixture
def use_policy():
    """`use_policy(name)`: a dtype policy until the test ends."""
    before = keras.config.dtype_policy()
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy(before)


@pytest.fixture
def use_floatx():
    """`use_floatx(name)`: the number type of layers and losses until the test ends."""
    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()

    def use(name):
        keras.config.set_floatx(name)
        keras.config.set_dtype_policy(name)

    yield use
    keras.config.set_floatx(floatx)
    keras.config.set_dtype_policy(policy)


def deep(scale: float = 1.0) -> keras.Model:
    keras.utils.set_random_seed(1)
    inputs = keras.Input((6,))
    x = keras.layers.Dense(8, activation="tanh", name="one")(inputs)
    x = keras.layers.LayerNormalization(name="norm")(x)
    x = keras.layers.Dense(8, activation="tanh", name="two")(x)
    x = keras.layers.Dense(4, name="top")(x)
    return keras.Model(inputs, keras.layers.Rescaling(scale, dtype=keras.config.floatx())(x))


def loss_fn() -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def fit_in_parts(model: keras.Model, x, y) -> tuple[list[float], list[float]]:
    """Plain Keras, one microbatch after the other: losses of the batches, and loss scales."""
    optimizer, loss_of = model.optimizer, loss_fn()

    @tf.function
    def train_step(x, y):
        sums, losses = None, []
        for x_part, y_part in zip(tf.split(x, PARTS), tf.split(y, PARTS), strict=True):
            with tf.GradientTape() as tape:
                loss = loss_of(y_part, model(x_part, training=True)) / PARTS
                scaled = optimizer.scale_loss(loss)
            found = tape.gradient(scaled, model.trainable_weights)
            sums = found if sums is None else [a + b for a, b in zip(sums, found, strict=True)]
            losses.append(loss)
        optimizer.apply_gradients(zip(sums, model.trainable_weights, strict=True))
        return tf.add_n(losses)

    found = []
    for i in range(0, len(x), ROWS):
        loss = train_step(tf.constant(x[i : i + ROWS]), tf.constant(y[i : i + ROWS]))
        found.append((float(loss), float(getattr(optimizer, "dynamic_scale", 1.0))))
    losses, scales = zip(*found, strict=True)
    return list(losses), list(scales)


class Seen(keras.callbacks.Callback):
    """Notes the loss scale after each batch."""

    def __init__(self):
        super().__init__()
        self.scales = []

    def on_train_batch_end(self, batch, logs=None):
        self.scales.append(float(self.model.optimizer.dynamic_scale))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_fit_is_that_of_plain_keras_over_the_same_microbatches(use_policy, policy):
    use_policy(policy)
    x, y = data(ROWS * STEPS)
    plain, split = deep(), smp.DistributedModel.from_keras(deep())
    for model in (plain, split):
        model.compile(keras.optimizers.Adam(0.01), loss_fn())
    is_scaled = isinstance(split.optimizer, keras.optimizers.LossScaleOptimizer)
    assert is_scaled is (policy == "mixed_float16")
    losses, _ = fit_in_parts(plain, x, y)
    history = split.fit(x, y, batch_size=ROWS, shuffle=False, verbose=0).history
    assert_close(np.mean(losses), history["loss"][0], rtol=1e-5)
    assert_close(plain.get_weights(), split.get_weights(), rtol=1e-5, atol=1e-6)
    assert {v.dtype for v in split.trainable_variables} == {"float32"}
    assert split(x[:2]).dtype == tf.float32
    assert split.get_layer("one").compute_dtype == policy.removeprefix("mixed_")


def test_whole_batches_in_half_precision_are_near_those_of_plain_keras(use_policy):
    """Sums over the rows are rounded per microbatch: no closer than half precision is."""
    use_policy("mixed_float16")
    x, y = data(ROWS * STEPS + 3)
    found = []
    for wrap in (lambda model: model, smp.DistributedModel.from_keras):
        model = wrap(deep())
        model.compile(keras.optimizers.SGD(0.1), loss_fn(), metrics=["accuracy"])
        history = model.fit(
            x, y, batch_size=ROWS, epochs=2, shuffle=False, verbose=0, validation_data=(x, y)
        )
        found.append((history.history["loss"], history.history["val_loss"], model.get_weights()))
    assert_close(*found, rtol=5e-3, atol=2e-3)


@pytest.mark.parametrize("kind", ["in parts", "of the whole batch"])
def test_loss_scale_goes_down_and_up_as_in_plain_keras(use_policy, kind):
    """Large outputs overflow at the first scale; every second finite step doubles it."""
    use_policy("mixed_float16")
    x, y = data(ROWS * 12)

    def own_loss(y, outputs):
        return loss_fn()(y, outputs)

    plain, split, seen = deep(64.0), smp.DistributedModel.from_keras(deep(64.0)), Seen()
    for model in (plain, split):
        optimizer = keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(1e-4), initial_scale=2.0**17, dynamic_growth_steps=2
        )
        model.compile(optimizer, loss_fn() if kind == "in parts" else own_loss)
    _, scales = fit_in_parts(plain, x, y)
    split.fit(x, y, batch_size=ROWS, shuffle=False, verbose=0, callbacks=[seen])
    assert seen.scales == scales
    steps = np.diff(np.log2([2.0**17, *scales]))
    assert {-1.0, 1.0} <= set(steps), scales
    assert int(split.optimizer.iterations) == int(plain.optimizer.iterations) < len(scales)
    assert_close(plain.get_weights(), split.get_weights(), rtol=1e-5, atol=1e-6)


@keras.saving.register_keras_serializable("opensmp_tests")
class Overflowing(keras.layers.Layer):
    """Passes its input on, times a weight whose gradient is infinite when inputs are large."""

    def build(self, shape):
        self.factor = self.add_weight(shape=(), initializer="ones", name="factor")

    def call(self, x):
        @tf.custom_gradient
        def scaled(x, factor):
            def gradient(upstream):
                large = tf.reduce_max(tf.abs(x)) > 100.0
                return upstream, tf.where(large, np.inf, tf.reduce_sum(upstream * x))

            return x * factor, gradient

        return scaled(x, tf.convert_to_tensor(self.factor))


@pytest.mark.parametrize("where", ["first", "last"])
def test_overflow_in_one_partition_leaves_the_step_out_in_all(where):
    x, y = data(16)
    x[8] = 1000.0  # one row of one microbatch of the second batch

    def make():
        keras.utils.set_random_seed(1)
        inputs = keras.Input((6,))
        h = Overflowing()(inputs) if where == "first" else inputs
        h = keras.layers.Dense(6, name="one")(h)
        h = keras.layers.Dense(6, name="two")(h)
        h = h if where == "first" else Overflowing()(h)
        return keras.Model(inputs, keras.layers.Dense(4, name="top")(h))

    def use(model):
        optimizer = keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(0.001, momentum=0.9), initial_scale=4.0
        )
        model.compile(optimizer, loss_fn())
        weights = []
        see = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: weights.append(model.get_weights())
        )
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=[see])
        for before, after in zip(*weights, strict=True):
            np.testing.assert_array_equal(before, after)
        assert int(optimizer.iterations) == 1
        return float(optimizer.dynamic_scale)

    assert_same(make, use)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_floatx(use_floatx, dtype):
    use_floatx(dtype)
    x, y = data(22)

    def make():
        model = deep()
        model.compile(keras.optimizers.SGD(0.1), loss_fn())
        return model

    found = []
    for wrap in (lambda model: model, smp.DistributedModel.from_keras):
        model = wrap(make())
        history = model.fit(x, y, batch_size=8, shuffle=False, verbose=0).history["loss"]
        weights = [tf.cast(w, "float64").numpy() for w in model.weights]
        found.append(([float(loss) for loss in history], weights))
        assert {v.dtype for v in model.trainable_variables} == {dtype}
    exact = {"rtol": 1e-12, "atol": 1e-13}
    assert_close(*found, **(exact if dtype == "float64" else {"rtol": 0.05, "atol": 0.05}))


def test_no_trace_of_another_number_type_is_left():
    assert keras.config.floatx() == "float32"
    assert keras.config.dtype_policy().name == "float32"
