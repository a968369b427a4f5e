"""The models, data and losses that the benchmarks share. All data is random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

import opensmp as smp


class Workload(NamedTuple):
    """A model to train and one batch for it.

    Attributes:
        name: Name, with what decides its size.
        build: Makes the model; the same weights for the same Keras seed.
        inputs: A batch of inputs.
        labels: Integer labels of the batch.
    """

    name: str
    build: Callable[..., keras.Model]
    inputs: Any
    labels: Any


def loss_function() -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def mlp(layers: int, units: int, batch: int) -> Workload:
    def build() -> keras.Model:
        x = inputs = keras.Input((units,))
        for _ in range(layers):
            x = keras.layers.Dense(units, activation="gelu")(x)
        return keras.Model(inputs, keras.layers.Dense(10)(x))

    random = np.random.default_rng(0)
    return Workload(
        f"MLP, {layers} x {units}, batch {batch}",
        build,
        random.normal(size=(batch, units)).astype("float32"),
        random.integers(0, 10, batch),
    )


def cnn(filters: int, size: int, batch: int) -> Workload:
    def stage(x: Any, count: int) -> Any:
        for _ in range(2):
            x = keras.layers.Conv2D(count, 3, padding="same", use_bias=False)(x)
            x = keras.layers.BatchNormalization()(x)
            x = keras.layers.ReLU()(x)
        return keras.layers.MaxPooling2D()(x)

    def build() -> keras.Model:
        x = images = keras.Input((size, size, 3))
        x = stage(stage(stage(x, filters), 2 * filters), 4 * filters)
        x = keras.layers.GlobalAveragePooling2D()(x)
        x = keras.layers.Dropout(0.2, seed=1)(x)
        return keras.Model(images, keras.layers.Dense(10)(x))

    random = np.random.default_rng(0)
    return Workload(
        f"CNN, 6 convolutions from {filters}, {size} x {size}, batch {batch}",
        build,
        random.normal(size=(batch, size, size, 3)).astype("float32"),
        random.integers(0, 10, batch),
    )


def transformer(blocks: int, width: int, length: int, vocabulary: int, batch: int) -> Workload:
    def block(x: Any) -> Any:
        h = keras.layers.LayerNormalization()(x)
        attention = keras.layers.MultiHeadAttention(4, width // 4)
        x = keras.layers.Add()([x, attention(h, h, use_causal_mask=True)])
        h = keras.layers.LayerNormalization()(x)
        h = keras.layers.Dense(4 * width, activation="gelu")(h)
        return keras.layers.Add()([x, keras.layers.Dense(width)(h)])

    def build() -> keras.Model:
        tokens = keras.Input((length,), dtype="int32")
        x = keras.layers.Embedding(vocabulary, width)(tokens)
        for _ in range(blocks):
            x = block(x)
        x = keras.layers.LayerNormalization()(x)
        return keras.Model(tokens, keras.layers.Dense(vocabulary)(x))

    random = np.random.default_rng(0)
    return Workload(
        f"Transformer, {blocks} blocks of {width}, length {length}, batch {batch}",
        build,
        random.integers(0, vocabulary, (batch, length)).astype("int32"),
        random.integers(0, vocabulary, (batch, length)),
    )


def split_step(
    model: Any,
    optimizer: keras.optimizers.Optimizer,
    accumulate: str = "variable",
    reduce: Callable[[Any], Any] = lambda nest: nest,
) -> Callable[..., Any]:
    """A training step of a distributed model: from inputs and labels to the mean loss.

    Args:
        model: The distributed model.
        optimizer: Its optimizer.
        accumulate: How microbatches' gradients are added, see `StepOutput.accumulate`.
        reduce: What becomes of gradients and loss, such as `smp.allreduce` over replicas.
    """
    loss_fn = loss_function()

    @smp.step
    def forward_backward(inputs, labels):
        with tf.GradientTape() as tape:
            loss = loss_fn(labels, model(inputs, training=True))
        return tape.gradient(loss, model.trainable_variables), loss

    @tf.function
    def train_step(inputs, labels):
        gradients, loss = forward_backward(inputs, labels)
        gradients = reduce([gradient.accumulate(accumulate) for gradient in gradients])
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return reduce(loss.reduce_mean())

    return train_step
