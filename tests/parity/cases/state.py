"""State: random seeds, counters, variables that are not Keras', losses that layers add."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from parity.bounds import REASSOCIATED, SEVERAL_USES
from parity.case import (
    CYCLIC,
    TWO,
    Case,
    Parts,
    StepFunction,
    evaluation,
    mean_squared_error,
    supervised,
    vectors,
)
from parity.layout import Maker

Tensor = Any


def random_stages(make: Maker) -> Any:
    """One generator used in two partitions, one of its own, and Keras' global one."""

    class Random(make.Model):
        def __init__(self) -> None:
            super().__init__()
            self.shared = keras.random.SeedGenerator(7)
            self.own = keras.random.SeedGenerator(8)
            self.stages = [keras.layers.Dense(8, activation="tanh") for _ in range(3)]
            self.noise = keras.layers.GaussianNoise(0.1)

        def call(self, x: Tensor, training: bool | None = None) -> Tensor:
            with make.partition(0):
                x = self.stages[0](x)
                x = x + 0.1 * keras.random.normal(tf.shape(x), seed=self.shared)
            with make.partition(1):
                x = self.noise(self.stages[1](x), training=training)
                x = x * keras.random.uniform(tf.shape(x), seed=self.own)
                x = keras.random.dropout(x, 0.2, seed=self.shared)
            with make.partition(2):
                x = x + keras.random.truncated_normal(tf.shape(x))
                return self.stages[2](x)

    return Random()


def spectral(make: Maker) -> Any:
    """The power iteration's vector is state that the step before left."""

    class Spectral(make.Model):
        def __init__(self) -> None:
            super().__init__()
            self.stages = [
                keras.layers.SpectralNormalization(keras.layers.Dense(8, activation="relu"))
                for _ in range(3)
            ]

        def call(self, x: Tensor, training: bool | None = None) -> Tensor:
            for stage, layer in enumerate(self.stages):
                with make.partition(stage):
                    x = layer(x, training=training)
            return x

    return Spectral()


class Affine(tf.Module):
    """A module as written without Keras: its variable is made at its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel: Any = None
        self.num_calls = tf.Variable(0, trainable=False)

    def __call__(self, x: Tensor) -> Tensor:
        if self.kernel is None:
            with tf.init_scope():
                self.kernel = tf.Variable(tf.linspace(-1.0, 1.0, 64), name="kernel")
        self.num_calls.assign_add(1)
        return tf.matmul(x, tf.reshape(self.kernel, [8, 8]))


def raw_variables(make: Maker) -> Any:
    """A trainable `tf.Variable`, a counter, and a module with both."""
    weight = tf.Variable(tf.reshape(tf.linspace(-0.5, 0.5, 64), [8, 8]), name="weight")
    counter = tf.Variable(0.0, trainable=False, name="counter")
    module = Affine()

    class RawVariables(make.Model):
        def __init__(self) -> None:
            super().__init__()
            self.first = keras.layers.Dense(8, activation="tanh")
            self.last = keras.layers.Dense(3)

        def call(self, x: Tensor, training: bool | None = None) -> Tensor:
            with make.partition(0):
                x = tf.matmul(self.first(x), weight)
                counter.assign_add(1.0)
            with make.partition(1):
                x = tf.tanh(module(x)) * tf.cast(counter, x.dtype)
            with make.partition(2):
                return self.last(x)

    return {"model": RawVariables(), "weight": weight, "counter": counter, "module": module}


def with_raw_variables(parts: Parts) -> StepFunction:
    def step(x: Any, y: Any) -> dict[str, Any]:
        model, weight, module = parts["model"], parts["weight"], parts["module"]
        with tf.GradientTape() as tape:
            prediction = model(x, training=True)
            loss = mean_squared_error(y, prediction)
        sources = {
            "model": model.trainable_variables,
            "weight": [weight],
            "module": list(module.trainable_variables),
        }
        return {
            "loss": loss,
            "prediction": prediction,
            "gradients": tape.gradient(loss, sources),
        }

    return step


class Counter(keras.layers.Layer):
    """Keras state that the call reads after it has assigned it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.add_weight(shape=(), initializer="zeros", dtype="int32", trainable=False)
        self.mean = self.add_weight(shape=(8,), initializer="zeros", trainable=False)

    def call(self, x: Tensor) -> Tensor:
        self.count.assign_add(1)
        self.mean.assign(0.9 * self.mean + 0.1 * tf.reduce_mean(x, axis=0))
        return x - tf.stop_gradient(self.mean.value) / tf.cast(self.count.value, x.dtype)


def own_state(make: Maker) -> Any:
    """The counter is called in two partitions: the second call reads what the first wrote."""

    class OwnState(make.Model):
        def __init__(self) -> None:
            super().__init__()
            self.counter = Counter()
            self.stages = [keras.layers.Dense(8, activation="tanh") for _ in range(3)]

        def call(self, x: Tensor, training: bool | None = None) -> Tensor:
            with make.partition(0):
                x = self.counter(self.stages[0](x))
            with make.partition(1):
                x = self.counter(self.stages[1](x))
            with make.partition(2):
                return self.stages[2](x)

    return OwnState()


def regularized(make: Maker) -> Any:
    """Penalties on weights and on activities, and losses that `call` adds, in every stage."""

    class Regularized(make.Model):
        def __init__(self) -> None:
            super().__init__()
            self.stages = [
                keras.layers.Dense(
                    8,
                    activation="tanh",
                    kernel_regularizer=keras.regularizers.L2(0.01 * (stage + 1)),
                    activity_regularizer=keras.regularizers.L1(0.001),
                )
                for stage in range(3)
            ]
            self.penalty = keras.layers.ActivityRegularization(l2=0.01)

        def call(self, x: Tensor, training: bool | None = None) -> Tensor:
            for stage, layer in enumerate(self.stages):
                with make.partition(stage):
                    x = self.penalty(layer(x))
                    self.add_loss(0.1 * tf.reduce_mean(tf.square(x)))
            return x

    return Regularized()


def with_losses(parts: Parts) -> StepFunction:
    """The step adds `model.losses`, as Keras' own training does."""
    model = parts["model"]

    def step(x: Any, y: Any) -> dict[str, Any]:
        with tf.GradientTape() as tape:
            prediction = model(x, training=True)
            losses = list(model.losses)
            loss = mean_squared_error(y, prediction) + tf.add_n(losses)
        gradients = tape.gradient(loss, model.trainable_variables)
        return {"loss": loss, "losses": losses, "gradients": {"model": gradients}}

    return step


def with_metrics(make: Maker) -> Any:
    from parity.cases.dense import mlp

    return {
        "model": mlp(make),
        "mean": keras.metrics.Mean(),
        "error": keras.metrics.MeanAbsoluteError(),
    }


def updating_metrics(parts: Parts) -> StepFunction:
    """Metrics are updated once per microbatch, and read in between."""
    inner = supervised()(parts)

    def step(x: Any, y: Any) -> dict[str, Any]:
        results = inner(x, y)
        parts["mean"].update_state(results["loss"])
        parts["error"].update_state(y, results["prediction"])
        return {**results, "mean": parts["mean"].result(), "error": parts["error"].result()}

    return step


CASES = (
    Case(
        "random numbers in every stage",
        random_stages,
        vectors(8, 8),
        supervised(),
        num_stages=3,
        bound=REASSOCIATED,
    ),
    Case(
        "random numbers, pattern 0-1-0",
        random_stages,
        vectors(8, 8),
        supervised(),
        num_stages=3,
        layouts=CYCLIC[:1],
        bound=REASSOCIATED,
    ),
    Case(
        "SpectralNormalization",
        spectral,
        vectors(8, 8),
        supervised(),
        num_stages=3,
        layouts=TWO,
        evaluate=evaluation(),
    ),
    Case(
        "tf.Variable, tf.Module, counters",
        raw_variables,
        vectors(8, 3),
        with_raw_variables,
        num_stages=3,
        layouts=TWO,
    ),
    Case(
        "state read after it is assigned",
        own_state,
        vectors(8, 8),
        supervised(),
        num_stages=3,
        layouts=TWO,
    ),
    Case(
        "add_loss, regularizers",
        regularized,
        vectors(8, 8),
        with_losses,
        bound=SEVERAL_USES,
        num_stages=3,
        layouts=TWO,
    ),
    Case(
        "metrics updated in the step", with_metrics, vectors(8, 3), updating_metrics, num_stages=4
    ),
)
