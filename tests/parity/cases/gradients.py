"""Gradients off the beaten track: of inputs, of frozen variables, of nothing at all."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from parity.bounds import REASSOCIATED
from parity.case import TWO, Case, Parts, StepFunction, mean_squared_error, supervised, vectors
from parity.cases.dense import frozen_first_stages, mlp
from parity.layout import Maker

Tensor = Any


def adversarial(parts: Parts) -> StepFunction:
    """The model is called again on inputs moved along their gradient."""
    model = parts["model"]

    def step(x: Any, y: Any) -> dict[str, Any]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = mean_squared_error(y, model(x, training=True))
        moved = x + 0.1 * tf.sign(tape.gradient(loss, x))
        with tf.GradientTape() as tape:
            loss = mean_squared_error(y, model(moved, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        return {"loss": loss, "moved": moved, "gradients": {"model": gradients}}

    return step


def by_tf_gradients(parts: Parts) -> StepFunction:
    """`tf.gradients` in the step, with respect to variables and to the input."""
    model = parts["model"]

    def step(x: Any, y: Any) -> dict[str, Any]:
        loss = mean_squared_error(y, model(x, training=True))
        gradients = tf.gradients(loss, [v.value for v in model.trainable_variables])
        (of_x,) = tf.gradients(loss, [x])
        return {"loss": loss, "of x": of_x, "gradients": {"model": gradients}}

    return step


def by_tf_gradients_in_inference(parts: Parts) -> StepFunction:
    model = parts["model"]

    def step(x: Any, y: Any) -> dict[str, Any]:
        loss = mean_squared_error(y, model(x, training=False))
        gradients = tf.gradients(loss, [v.value for v in model.trainable_variables])
        return {"loss": loss, "gradients": {"model": gradients}}

    return step


def of_frozen_variables(parts: Parts) -> StepFunction:
    """A frozen variable's gradient, asked for all the same."""
    model = parts["model"]

    def step(x: Any, y: Any) -> dict[str, Any]:
        with tf.GradientTape() as tape:
            loss = mean_squared_error(y, model(x, training=True))
        frozen = [v.value for v in model.non_trainable_variables]
        gradients, others = tape.gradient(loss, (model.trainable_variables, frozen))
        return {"loss": loss, "frozen": others, "gradients": {"model": gradients}}

    return step


def unconnected(parts: Parts) -> StepFunction:
    """The loss does not depend on the model at all, but the prediction is returned."""
    model = parts["model"]

    def step(x: Any, y: Any) -> dict[str, Any]:
        with tf.GradientTape() as tape:
            prediction = model(x, training=True)
            loss = tf.reduce_mean(y)
        gradients = tape.gradient(loss, model.trainable_variables)
        assert all(gradient is None for gradient in gradients)
        return {"loss": loss, "prediction": prediction, "gradients": {"model": gradients}}

    return step


def unconnected_as_zero(parts: Parts) -> StepFunction:
    model = parts["model"]

    def step(x: Any, y: Any) -> dict[str, Any]:
        with tf.GradientTape() as tape:
            heads = model(x, training=True)
            loss = mean_squared_error(y, heads[0])
        variables = [v.value for v in model.trainable_variables]
        gradients = tape.gradient(
            loss, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        return {"loss": loss, "gradients": {"model": gradients}}

    return step


def two_heads(make: Maker) -> Any:
    class Heads(make.Model):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = keras.layers.Dense(8, activation="tanh")
            self.heads = [keras.layers.Dense(3), keras.layers.Dense(2)]

        def call(self, x: Tensor, training: bool | None = None) -> Any:
            with make.partition(0):
                x = self.trunk(x)
            with make.partition(1):
                return [head(x) for head in self.heads]

    return Heads()


def infinite_slope(make: Maker) -> Any:
    """Beside its prediction returns a norm whose gradient at zero is not finite."""

    class Slope(make.Model):
        def __init__(self) -> None:
            super().__init__()
            self.first = keras.layers.Dense(8, activation="relu")
            self.last = keras.layers.Dense(3)

        def call(self, x: Tensor, training: bool | None = None) -> Any:
            with make.partition(0):
                x = self.first(x)
            with make.partition(1):
                return self.last(x), tf.sqrt(tf.reduce_sum(tf.nn.relu(x - 1e6)))

    return Slope()


def first_output_only(parts: Parts) -> StepFunction:
    model = parts["model"]

    def step(x: Any, y: Any) -> dict[str, Any]:
        with tf.GradientTape() as tape:
            prediction, norm = model(x, training=True)
            loss = mean_squared_error(y, prediction)
        gradients = tape.gradient(loss, model.trainable_variables)
        return {"loss": loss, "norm": norm, "gradients": {"model": gradients}}

    return step


def unused_variable(make: Maker) -> Any:
    """A trainable variable that `call` never reads."""
    model = mlp(make)
    model.unused = keras.layers.Dense(2)
    model.unused.build((None, 4))
    return model


def _mlp(name: str, step: Any, parts: Any = mlp, **options: Any) -> Case:
    return Case(name, parts, vectors(8, 3), step, num_stages=4, layouts=TWO, **options)


CASES = (
    _mlp("adversarial inputs", adversarial, bound=REASSOCIATED),
    _mlp("tf.gradients, training=False", by_tf_gradients_in_inference),
    _mlp("gradients of frozen variables", of_frozen_variables, frozen_first_stages),
    _mlp("tf.gradients, frozen stages", by_tf_gradients, frozen_first_stages),
    _mlp("loss without the model", unconnected),
    _mlp("variable that is never read", supervised(), unused_variable),
    Case("unconnected as zero", two_heads, vectors(8, 3), unconnected_as_zero, layouts=TWO),
    Case(
        "infinite slope on an unused path",
        infinite_slope,
        vectors(8, 3),
        first_output_only,
        layouts=TWO,
    ),
)
