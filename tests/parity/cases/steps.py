"""Steps: several models, several tapes, and gradients of all kinds."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from parity.bounds import REASSOCIATED, REASSOCIATED_DOUBLE
from parity.case import (
    TWO,
    Case,
    Parts,
    StepFunction,
    cross_entropy,
    images,
    mean_squared_error,
    momentum,
    vectors,
)
from parity.cases.convolution import cnn, resnet
from parity.cases.dense import branches, branches_batch, frozen_stage, mlp
from parity.layout import Maker, with_policy

Tensor = Any


def two_mlps(make: Maker) -> dict[str, Any]:
    teacher = mlp(make)
    teacher.trainable = False
    return {"teacher": teacher, "student": mlp(make)}


def distillation(parts: Parts) -> StepFunction:
    """The teacher is frozen and in inference mode, the student learns from it."""
    teacher, student = parts["teacher"], parts["student"]

    def step(x: Any, y: Any) -> dict[str, Any]:
        soft = teacher(x, training=False)
        with tf.GradientTape() as tape:
            prediction = student(x, training=True)
            loss = mean_squared_error(soft, prediction) + 0.5 * mean_squared_error(y, prediction)
        gradients = tape.gradient(loss, student.trainable_variables)
        return {"loss": loss, "soft": soft, "gradients": {"student": gradients}}

    return step


def gan_models(make: Maker) -> dict[str, Any]:
    class Network(make.Model):
        def __init__(self, units: int) -> None:
            super().__init__()
            self.hidden = keras.layers.Dense(8, activation="tanh")
            self.top = keras.layers.Dense(units)

        def call(self, x: Tensor, training: bool | None = None) -> Tensor:
            with make.partition(0):
                x = self.hidden(x)
            with make.partition(1):
                return self.top(x)

    return {"generator": Network(6), "discriminator": Network(1)}


def gan(parts: Parts) -> StepFunction:
    """The discriminator is called twice; two tapes, each for the variables of one model."""
    generator, discriminator = parts["generator"], parts["discriminator"]

    def step(real: Any, noise: Any) -> dict[str, Any]:
        with tf.GradientTape() as generator_tape, tf.GradientTape() as discriminator_tape:
            fake = generator(noise, training=True)
            of_real = discriminator(real, training=True)
            of_fake = discriminator(fake, training=True)
            generator_loss = tf.reduce_mean(tf.nn.softplus(-of_fake))
            discriminator_loss = tf.reduce_mean(tf.nn.softplus(-of_real) + tf.nn.softplus(of_fake))
        gradients = {
            "generator": generator_tape.gradient(generator_loss, generator.trainable_variables),
            "discriminator": discriminator_tape.gradient(
                discriminator_loss, discriminator.trainable_variables
            ),
        }
        return {
            "losses": [generator_loss, discriminator_loss],
            "fake": fake,
            "gradients": gradients,
        }

    return step


def siamese(parts: Parts) -> StepFunction:
    """One model called twice in a step."""
    model = parts["model"]

    def step(x: Any, y: Any) -> dict[str, Any]:
        with tf.GradientTape() as tape:
            first, second = model(x, training=True), model(y, training=True)
            loss = tf.reduce_mean(tf.square(first - second)) + tf.reduce_mean(first * second)
        gradients = tape.gradient(loss, model.trainable_variables)
        return {"loss": loss, "outputs": (first, second), "gradients": {"model": gradients}}

    return step


def chained(parts: Parts) -> StepFunction:
    """One model's output is the other's input."""
    first, second = parts["teacher"], parts["student"]

    def step(x: Any, y: Any) -> dict[str, Any]:
        with tf.GradientTape() as tape:
            hidden = tf.pad(first(x, training=True), [[0, 0], [0, 5]])
            prediction = second(tf.tanh(hidden), training=True)
            loss = mean_squared_error(y, prediction)
        gradients = tape.gradient(
            loss, {"teacher": first.trainable_variables, "student": second.trainable_variables}
        )
        return {"loss": loss, "hidden": hidden, "gradients": gradients}

    return step


def two_trained_mlps(make: Maker) -> dict[str, Any]:
    return {"teacher": mlp(make), "student": mlp(make)}


def wrt_inputs(parts: Parts) -> StepFunction:
    """Gradients with respect to the model's input, to its output, and to its variables."""
    model = parts["model"]

    def step(x: Any, y: Any) -> dict[str, Any]:
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            prediction = model(x, training=True)
            loss = mean_squared_error(y, prediction)
        of_input, of_output = tape.gradient(loss, [x, prediction])
        gradients = tape.gradient(loss, model.trainable_variables)
        return {
            "loss": loss,
            "of input": of_input,
            "of output": of_output,
            "gradients": {"model": gradients},
        }

    return step


def persistent(parts: Parts) -> StepFunction:
    """Two losses, two gradients from one persistent tape."""
    model = parts["model"]

    def step(x: Any, y: Any) -> dict[str, Any]:
        with tf.GradientTape(persistent=True) as tape:
            prediction = model(x, training=True)
            error = mean_squared_error(y, prediction)
            size = tf.reduce_mean(tf.abs(prediction))
        of_error = tape.gradient(error, model.trainable_variables)
        of_size = tape.gradient(size, model.trainable_variables)
        combined = [a + 0.1 * b for a, b in zip(of_error, of_size, strict=True)]
        return {
            "losses": (error, size),
            "of size": of_size,
            "gradients": {"model": combined},
        }

    return step


def graph_gradients(parts: Parts) -> StepFunction:
    """`tf.gradients` in the step, with respect to trainable variables."""
    model = parts["model"]

    def step(x: Any, y: Any) -> dict[str, Any]:
        prediction = model(x, training=True)
        loss = mean_squared_error(y, prediction)
        gradients = tf.gradients(loss, [v.value for v in model.trainable_variables])
        return {"loss": loss, "gradients": {"model": gradients}}

    return step


def graph_gradients_of_images(parts: Parts) -> StepFunction:
    model = parts["model"]

    def step(x: Any, y: Any) -> dict[str, Any]:
        loss = cross_entropy(y, model(x, training=True))
        gradients = tf.gradients(loss, [v.value for v in model.trainable_variables])
        return {"loss": loss, "gradients": {"model": gradients}}

    return step


def graph_gradients_of_all(parts: Parts) -> StepFunction:
    """`tf.gradients` with respect to the input and to frozen variables as well."""
    model = parts["model"]

    def step(x: Any, y: Any) -> dict[str, Any]:
        prediction = model(x, training=True)
        loss = mean_squared_error(y, prediction)
        frozen = [v.value for v in model.non_trainable_variables]
        assert len(frozen) == 2
        of_rest = tf.gradients(loss, [x, *frozen])
        gradients = tf.gradients(loss, [v.value for v in model.trainable_variables])
        return {"loss": loss, "of rest": of_rest, "gradients": {"model": gradients}}

    return step


def unconnected(parts: Parts) -> StepFunction:
    """None, or zeros where asked for, for what the loss does not depend on."""
    model = parts["model"]

    def step(x: Any, y: Any) -> dict[str, Any]:
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            heads, (left, (right,)) = model(x, training=True)
            loss = mean_squared_error(y["scale"], heads["scale"])
            of_left = tf.reduce_mean(left)
        zeros = tape.gradient(
            of_left,
            [v.value for v in model.trainable_variables],  # Keras' own cannot be zeros
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        return {
            "loss": loss,
            "right": right,
            "of inputs": tape.gradient(of_left, x),
            "zeros": zeros,
            "none": tape.gradient(of_left, model.trainable_variables),
            "gradients": {"model": tape.gradient(loss, model.trainable_variables)},
        }

    return step


def watching_some(parts: Parts) -> StepFunction:
    """A tape that watches only the variables of the second stage."""
    model = parts["model"]

    def step(x: Any, y: Any) -> dict[str, Any]:
        model(x[:1], training=False)  # makes the variables
        watched = model.hidden[1].trainable_variables
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            for variable in watched:
                tape.watch(variable.value)
            loss = mean_squared_error(y, model(x, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        assert sum(gradient is None for gradient in gradients) == len(gradients) - 2
        return {"loss": loss, "gradients": {"model": gradients}}

    return step


def weighted(parts: Parts) -> StepFunction:
    """Output gradients and weights given by hand, a loss scaled up and gradients down again."""
    model = parts["model"]

    def step(x: Any, y: Any) -> dict[str, Any]:
        with tf.GradientTape() as tape:
            prediction = model(x, training=True)
        gradients = tape.gradient(
            prediction, model.trainable_variables, output_gradients=1024.0 * (prediction - y)
        )
        gradients = [gradient / 1024.0 for gradient in gradients]
        return {"prediction": prediction, "gradients": {"model": gradients}}

    return step


def _case(name: str, step: Any, parts: Any = mlp, **options: Any) -> Case:
    options = {"num_stages": 4} | options
    return Case(name, parts, vectors(8, 3), step, **options)


CASES = (
    _case("teacher and student", distillation, two_mlps),
    _case("two models, one behind the other", chained, two_trained_mlps),
    Case(
        "GAN, discriminator called twice",
        gan_models,
        vectors(6, 6),
        gan,
        layouts=TWO,
        bound=REASSOCIATED,
    ),
    Case(
        "model called twice in a step",
        mlp,
        vectors(8, 8),
        siamese,
        num_stages=4,
        bound=REASSOCIATED,
    ),
    Case(
        "stateful model called twice in a step",
        # In double precision: the loss compares two outputs that are nearly equal, and batch
        # normalisation over a few images magnifies the rounding of what is left.
        lambda make: with_policy("float64", resnet, make),
        lambda random, size: (
            images(8, 3, 5, "float64")(random, size)[0],
            images(8, 3, 5, "float64")(random, size)[0],
        ),
        siamese,
        num_stages=4,
        layouts=TWO,
        bound=REASSOCIATED_DOUBLE,
        optimizer=momentum,
    ),
    _case("gradients of the input and the output", wrt_inputs),
    _case("persistent tape", persistent, bound=REASSOCIATED),
    _case("tf.gradients", graph_gradients),
    _case("tf.gradients of inputs and frozen variables", graph_gradients_of_all, frozen_stage),
    Case("unconnected gradients", branches, branches_batch, unconnected, num_stages=4),
    _case("tape that watches some variables", watching_some, bound=REASSOCIATED),
    _case("output gradients", weighted, bound=REASSOCIATED),
    Case(
        "tf.gradients, CNN",
        cnn,
        images(8, 3, 5),
        graph_gradients_of_images,
        num_stages=4,
        layouts=TWO,
    ),
)
