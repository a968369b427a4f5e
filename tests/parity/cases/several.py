"""Several models in one step, and models called more than once."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from parity.bounds import REASSOCIATED
from parity.case import TWO, Case, Parts, StepFunction, mean_squared_error, vectors
from parity.cases.dense import mlp
from parity.layout import Maker

Tensor = Any


def teacher_and_student(make: Maker) -> dict[str, Any]:
    teacher = mlp(make)
    teacher.trainable = False
    return {"teacher": teacher, "student": mlp(make)}


def distillation(parts: Parts) -> StepFunction:
    teacher, student = parts["teacher"], parts["student"]

    def step(x: Any, y: Any) -> dict[str, Any]:
        target = teacher(x, training=False)
        with tf.GradientTape() as tape:
            prediction = student(x, training=True)
            loss = mean_squared_error(y, prediction) + mean_squared_error(target, prediction)
        gradients = tape.gradient(loss, student.trainable_variables)
        return {"loss": loss, "target": target, "gradients": {"student": gradients}}

    return step


def through_the_teacher(parts: Parts) -> StepFunction:
    """The gradient runs through a frozen model into the one before it."""
    teacher, student = parts["teacher"], parts["student"]

    def step(x: Any, y: Any) -> dict[str, Any]:
        with tf.GradientTape() as tape:
            prediction = student(x, training=True)
            judged = teacher(tf.pad(prediction, [[0, 0], [0, 5]]), training=False)
            loss = mean_squared_error(y, judged)
        gradients = tape.gradient(loss, student.trainable_variables)
        return {"loss": loss, "gradients": {"student": gradients}}

    return step


def two_models(make: Maker) -> dict[str, Any]:
    return {"generator": mlp(make), "discriminator": mlp(make)}


def adversaries(parts: Parts) -> StepFunction:
    """Each model has its own loss; the discriminator runs on real and on made data."""
    generator, discriminator = parts["generator"], parts["discriminator"]

    def step(x: Any, y: Any) -> dict[str, Any]:
        with tf.GradientTape(persistent=True) as tape:
            made = tf.pad(generator(x, training=True), [[0, 0], [0, 5]])
            real = tf.reduce_mean(tf.nn.softplus(-discriminator(x, training=True)))
            fake = discriminator(made, training=True)
            against = real + tf.reduce_mean(tf.nn.softplus(fake))
            for_it = tf.reduce_mean(tf.nn.softplus(-fake))
        return {
            "losses": [against, for_it],
            "gradients": {
                "generator": tape.gradient(for_it, generator.trainable_variables),
                "discriminator": tape.gradient(against, discriminator.trainable_variables),
            },
        }

    return step


def siamese(parts: Parts) -> StepFunction:
    """One model with batch statistics and dropout on two views of the same examples."""
    model = parts["model"]

    def step(x: Any, y: Any) -> dict[str, Any]:
        with tf.GradientTape() as tape:
            one = model(x, training=True)
            other = model(tf.reverse(x, [1]), training=True)
            loss = mean_squared_error(one, other) + tf.reduce_mean(tf.square(one))
        gradients = tape.gradient(loss, model.trainable_variables)
        return {"loss": loss, "other": other, "gradients": {"model": gradients}}

    return step


def statistics(make: Maker) -> Any:
    """Batch statistics and dropout in both stages."""

    class Statistics(make.Model):
        def __init__(self) -> None:
            super().__init__()
            # No bias before the statistics: its gradient is zero but for rounding.
            self.dense = [keras.layers.Dense(8, use_bias=False) for _ in range(2)]
            self.norms = [keras.layers.BatchNormalization() for _ in range(2)]
            self.dropouts = [keras.layers.Dropout(0.3) for _ in range(2)]

        def call(self, x: Tensor, training: bool | None = None) -> Tensor:
            for stage in range(2):
                with make.partition(stage):
                    x = tf.nn.relu(self.norms[stage](self.dense[stage](x), training=training))
                    x = self.dropouts[stage](x, training=training)
            return x

    return Statistics()


def _dense(name: str, parts: Any, step: Any, **options: Any) -> Case:
    return Case(name, parts, vectors(8, 3), step, num_stages=4, layouts=TWO, **options)


CASES = (
    _dense("teacher and student", teacher_and_student, distillation),
    _dense("gradient through a frozen model", teacher_and_student, through_the_teacher),
    _dense("generator and discriminator", two_models, adversaries, bound=REASSOCIATED),
    Case("one model on two views", statistics, vectors(8, 1), siamese, layouts=TWO),
)
