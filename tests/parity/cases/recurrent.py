"""Recurrent models: loops inside layers, masks that travel between partitions."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from parity.bounds import REASSOCIATED
from parity.case import (
    AUTO,
    TWO,
    Case,
    Parts,
    StepFunction,
    evaluation,
    mean_squared_error,
    sequences,
    supervised,
)
from parity.layout import Maker

Tensor = Any
VOCABULARY, LENGTH, WIDTH = 19, 6, 8


def lstm(make: Maker, *, stateful: bool = False, unroll: bool = False) -> Any:
    class LSTM(make.Model):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = keras.layers.Embedding(VOCABULARY, WIDTH)
            options = {"stateful": stateful, "unroll": unroll}
            self.first = keras.layers.LSTM(WIDTH, return_sequences=True, **options)
            self.second = keras.layers.LSTM(WIDTH, dropout=0.2, recurrent_dropout=0.1, **options)
            self.top = keras.layers.Dense(3)

        def call(self, ids: Tensor, training: bool | None = None) -> Tensor:
            with make.partition(0):
                x = self.embedding(ids)
            with make.partition(1):
                x = self.first(x, training=training)
            with make.partition(2):
                x = self.second(x, training=training)
            with make.partition(3):
                return self.top(x)

    return LSTM()


def masked_gru(make: Maker) -> Any:
    """The embedding makes the mask in one partition, the layers that heed it are in others."""

    class MaskedGRU(make.Model):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = keras.layers.Embedding(VOCABULARY, WIDTH, mask_zero=True)
            self.first = keras.layers.Bidirectional(keras.layers.GRU(WIDTH, return_sequences=True))
            self.wide = keras.layers.TimeDistributed(keras.layers.Dense(WIDTH))
            self.second = keras.layers.Bidirectional(keras.layers.GRU(WIDTH), merge_mode="sum")
            self.top = keras.layers.Dense(3)

        def call(self, ids: Tensor, training: bool | None = None) -> Tensor:
            with make.partition(0):
                x = self.embedding(ids)
            with make.partition(1):
                x = self.first(x)
            with make.partition(2):
                x = self.second(self.wide(x))
            with make.partition(3):
                return self.top(x)

    return MaskedGRU()


def masked_output(make: Maker) -> Any:
    """The output carries a mask of its own."""

    class MaskedOutput(make.Model):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = keras.layers.Embedding(VOCABULARY, WIDTH, mask_zero=True)
            self.recurrent = keras.layers.GRU(WIDTH, return_sequences=True)

        def call(self, ids: Tensor, training: bool | None = None) -> Tensor:
            with make.partition(0):
                x = self.embedding(ids)
            with make.partition(1):
                return self.recurrent(x)

    return MaskedOutput()


def pooled_outside(parts: Parts) -> StepFunction:
    """A plain layer in the step heeds the mask of the model's output."""
    model = parts["model"]
    pool = keras.layers.GlobalAveragePooling1D()

    def step(x: Any, y: Any) -> dict[str, Any]:
        with tf.GradientTape() as tape:
            pooled = pool(model(x, training=True))
            loss = mean_squared_error(y, pooled)
        gradients = tape.gradient(loss, model.trainable_variables)
        return {"loss": loss, "pooled": pooled, "gradients": {"model": gradients}}

    return step


def masked_input(parts: Parts) -> StepFunction:
    """A plain layer in the step makes the mask that the model's layers heed."""
    model = parts["model"]
    mask = keras.layers.Masking()

    def step(x: Any, y: Any) -> dict[str, Any]:
        with tf.GradientTape() as tape:
            prediction = model(mask(x), training=True)
            loss = mean_squared_error(y, prediction)
        gradients = tape.gradient(loss, model.trainable_variables)
        return {"loss": loss, "prediction": prediction, "gradients": {"model": gradients}}

    return step


def two_recurrent(make: Maker) -> Any:
    class TwoRecurrent(make.Model):
        def __init__(self) -> None:
            super().__init__()
            self.first = keras.layers.GRU(WIDTH, return_sequences=True)
            self.second = keras.layers.SimpleRNN(3)

        def call(self, x: Tensor, training: bool | None = None) -> Tensor:
            with make.partition(0):
                x = self.first(x)
            with make.partition(1):
                return self.second(x)

    return TwoRecurrent()


def _padded_vectors(random: Any, size: int) -> tuple[Any, ...]:
    ids, y = sequences(LENGTH, VOCABULARY, 3, padded=True)(random, size)
    x = random.normal(size=(*ids.shape, 4)) * (ids != 0)[..., None]
    return x.astype("float32"), y


def _sequences(name: str, parts: Any, *, padded: bool = False, **options: Any) -> Case:
    batch = sequences(LENGTH, VOCABULARY, 3, padded=padded)
    return Case(name, parts, batch, supervised(), num_stages=4, **options)


CASES = (
    _sequences("LSTM", lstm, evaluate=evaluation()),
    _sequences("LSTM, unrolled", lambda make: lstm(make, unroll=True), bound=REASSOCIATED),
    _sequences("LSTM, stateful", lambda make: lstm(make, stateful=True)),
    _sequences("LSTM, automatic partitions", lstm, layouts=AUTO),
    _sequences(
        "bidirectional GRU, masks",
        masked_gru,
        padded=True,
        bound=REASSOCIATED,
        evaluate=evaluation(),
    ),
    Case(
        "mask on the output",
        masked_output,
        sequences(LENGTH, VOCABULARY, WIDTH, padded=True),
        pooled_outside,
        layouts=TWO,
    ),
    Case("mask on the input", two_recurrent, _padded_vectors, masked_input, layouts=TWO),
)
