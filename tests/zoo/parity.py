"""One training step of a zoo model: as plain Keras, and split by an automatic plan."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from zoo.entry import MICROBATCHES, Entry
from zoo.record import Difference, Record, Value

import opensmp as smp

SEED = 20

Nest = Any
Tensor = Any


@dataclass(frozen=True)
class Comparison:
    """How one split training step compares with the plain one.

    Attributes:
        model: Name of the model.
        dtype: The dtype of its weights and of all it computes.
        partitions: Number of partitions.
        parameters: Number of parameters in each partition.
        segments: Number of pieces that each partition runs per forward pass.
        differences: Largest difference of the losses, of the gradients of every
            microbatch, and of all variables after one optimizer step.
        plain_seconds: Time of the plain step, tracing included.
        split_seconds: Time of the split step, with trace, plan and lowering.
    """

    model: str
    dtype: str
    partitions: int
    parameters: tuple[int, ...]
    segments: tuple[int, ...]
    differences: dict[str, Difference]
    plain_seconds: float
    split_seconds: float


def compare(entry: Entry, partitions: Sequence[int], folder: Path) -> Iterator[Comparison]:
    """Compares one training step under automatic plans with plain Keras.

    The reference is the same model, made with the same seed, called for one microbatch
    after the other. Both use SGD with momentum, so that differences of gradients reach the
    weights as they are and not divided by their own size.

    Args:
        entry: The model.
        partitions: Numbers of partitions, one comparison for each.
        folder: An empty folder for the values of the plain step.
    """
    start = time.perf_counter()
    plain = Record(folder, _plain_step(entry))
    plain_seconds = time.perf_counter() - start
    for number in partitions:
        start = time.perf_counter()
        smp.init({"partitions": number, "microbatches": MICROBATCHES})
        model = smp.DistributedModel.from_keras(_build(entry))
        step = smp.step(_forward_backward(entry, model), autograph=False)
        differences = plain.differences(_split_step(entry, model, step))
        yield Comparison(
            model=entry.name,
            dtype=keras.config.floatx(),
            partitions=number,
            parameters=_parameters(model, number),
            segments=_segments(step),
            differences=differences,
            plain_seconds=plain_seconds,
            split_seconds=time.perf_counter() - start,
        )
        smp.shutdown()
        del model, step


def _build(entry: Entry) -> keras.Model:
    keras.utils.clear_session()
    keras.utils.set_random_seed(SEED)
    return entry.build()


def _batch(entry: Entry) -> tuple[Nest, Nest]:
    random = np.random.default_rng(SEED)
    return entry.batch(random, MICROBATCHES * entry.per_microbatch)


def _forward_backward(entry: Entry, model: keras.Model) -> Any:
    def forward_backward(inputs: Nest, labels: Nest) -> tuple[Tensor, list[Any]]:
        with tf.GradientTape() as tape:
            loss = entry.loss(labels, model(inputs, training=True))
            loss = tf.add_n([loss, *model.losses])
        return loss, tape.gradient(loss, model.trainable_variables)

    return forward_backward


def _plain_step(entry: Entry) -> Iterator[Value]:
    model = _build(entry)
    step = tf.function(_forward_backward(entry, model), autograph=False)
    inputs, labels = tf.nest.map_structure(tf.constant, _batch(entry))
    losses, gradients = [], []
    for m in range(MICROBATCHES):
        part = slice(m * entry.per_microbatch, (m + 1) * entry.per_microbatch)
        of_part = tf.nest.map_structure(lambda t, part=part: t[part], (inputs, labels))
        loss, of_loss = step(*of_part)
        losses.append(loss)
        gradients.append(of_loss)
    yield from _results(model, losses, gradients)
    means = [None if g[0] is None else _mean(g) for g in zip(*gradients, strict=True)]
    del gradients
    yield from _state(model, means)


def _split_step(entry: Entry, model: smp.DistributedModel, step: Any) -> Iterator[Value]:
    loss, outputs = step(*tf.nest.map_structure(tf.constant, _batch(entry)))
    gradients = [
        [None if output is None else output.outputs[m] for output in outputs]
        for m in range(MICROBATCHES)
    ]
    yield from _results(model, loss.outputs, gradients)
    means = [None if output is None else output.accumulate() for output in outputs]
    del gradients, outputs
    yield from _state(model, means)


def _results(
    model: keras.Model, losses: Sequence[Tensor], gradients: Sequence[Sequence[Any]]
) -> Iterator[Value]:
    for m, (loss, of_loss) in enumerate(zip(losses, gradients, strict=True)):
        yield Value("loss", f"microbatch {m}", loss)
        for variable, gradient in zip(model.trainable_variables, of_loss, strict=True):
            yield Value("gradient", f"{variable.path}, microbatch {m}", gradient)


def _state(model: keras.Model, gradients: Sequence[Any]) -> Iterator[Value]:
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    optimizer.build(model.trainable_variables)
    pairs = zip(gradients, model.trainable_variables, strict=True)
    optimizer.apply_gradients([(g, v) for g, v in pairs if g is not None])
    for variable in (*model.variables, *optimizer.variables):
        yield Value("state", variable.path, variable)


def _parameters(model: keras.Model, partitions: int) -> tuple[int, ...]:
    devices = [f"CPU:{partition}" for partition in range(partitions)]
    found = [(str(v.value.device)[-5:], math.prod(v.shape)) for v in model.weights]
    return tuple(sum(count for device, count in found if device == d) for d in devices)


def _segments(step: Any) -> tuple[int, ...]:
    return tuple(
        sum(action.kind == "F" and action.microbatch == 0 for action in order)
        for order in step.schedule.orders
    )


def _mean(gradients: Sequence[Any]) -> Any:
    if isinstance(gradients[0], tf.IndexedSlices):
        values = tf.concat([g.values for g in gradients], 0) / len(gradients)
        indices = tf.concat([g.indices for g in gradients], 0)
        return tf.IndexedSlices(values, indices, gradients[0].dense_shape)
    return functools.reduce(lambda total, g: total + g, gradients) / len(gradients)
