"""Inputs that are not floating-point tensors, and gradients that are not dense."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from parity.case import (
    CYCLIC,
    TWO,
    Case,
    Parts,
    StepFunction,
    mean_squared_error,
    sequences,
    supervised,
)
from parity.layout import Maker

Tensor = Any
WORDS = ("red", "green", "blue", "black", "white")


def strings(make: Maker) -> Any:
    """A lookup table in the first partition, one with weights behind it."""

    class Strings(make.Model):
        def __init__(self) -> None:
            super().__init__()
            self.lookup = keras.layers.StringLookup(vocabulary=list(WORDS))
            self.embedding = keras.layers.Embedding(len(WORDS) + 1, 8)
            self.top = keras.layers.Dense(3)

        def call(self, words: Tensor, training: bool | None = None) -> Tensor:
            with make.partition(0):
                ids = self.lookup(words)
            with make.partition(1):
                x = tf.reduce_mean(self.embedding(ids), axis=1)
            with make.partition(2):
                return self.top(x)

    return Strings()


def strings_batch(random: np.random.Generator, size: int) -> tuple[Any, ...]:
    words = random.choice([*WORDS, "unknown"], size=(size, 4))
    return words.astype(np.bytes_), random.normal(size=(size, 3)).astype("float32")


def strings_across(make: Maker) -> Any:
    """Strings cross the border between partitions."""

    class StringsAcross(make.Model):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = keras.layers.Embedding(16, 8)
            self.top = keras.layers.Dense(3)

        def call(self, words: Tensor, training: bool | None = None) -> Tensor:
            with make.partition(0):
                words = tf.strings.upper(words)
            with make.partition(1):
                ids = tf.strings.to_hash_bucket_fast(words, 16)
                return self.top(tf.reduce_sum(self.embedding(ids), axis=1))

    return StringsAcross()


def preprocessing(make: Maker) -> Any:
    """Layers that were adapted to data before: their statistics are variables of the model."""

    class Preprocessing(make.Model):
        def __init__(self) -> None:
            super().__init__()
            self.normalize = keras.layers.Normalization()
            self.normalize.adapt(np.arange(20, dtype="float32").reshape(5, 4))
            self.buckets = keras.layers.Discretization([-0.5, 0.0, 0.5])
            self.encode = keras.layers.CategoryEncoding(4, output_mode="one_hot")
            self.hidden = keras.layers.Dense(8, activation="relu")
            self.top = keras.layers.Dense(3)

        def call(self, x: Tensor, training: bool | None = None) -> Tensor:
            with make.partition(0):
                normal = self.normalize(x)
            with make.partition(1):
                codes = tf.reshape(self.encode(self.buckets(x)), [-1, 16])
                hidden = self.hidden(tf.concat([normal, codes], -1))
            with make.partition(2):
                return self.top(hidden)

    return Preprocessing()


def four_features(random: np.random.Generator, size: int) -> tuple[Any, ...]:
    x = random.normal(size=(size, 4)).astype("float32")
    return x, random.normal(size=(size, 3)).astype("float32")


def integers_across(make: Maker) -> Any:
    """Integers and booleans cross the borders, gradients only where there are floats."""

    class IntegersAcross(make.Model):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = keras.layers.Embedding(19, 8)
            self.hidden = keras.layers.Dense(8, activation="relu")
            self.top = keras.layers.Dense(3)

        def call(self, ids: Tensor, training: bool | None = None) -> Tensor:
            with make.partition(0):
                shifted = tf.cast((ids * 3 + 1) % 19, tf.int64)
                odd = ids % 2 == 1
            with make.partition(1):
                x = self.hidden(self.embedding(shifted))
            with make.partition(2):
                x = tf.where(odd[..., None], x, 0.5 * x) * tf.cast(shifted > 4, x.dtype)[..., None]
                return self.top(tf.reduce_max(x, axis=1))

    return IntegersAcross()


def two_uses_of_a_table(make: Maker) -> Any:
    """Rows of one table are read in two partitions: two sparse gradients of one variable."""

    class TwoUses(make.Model):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = keras.layers.Embedding(19, 8)
            self.hidden = keras.layers.Dense(8, activation="relu")
            self.top = keras.layers.Dense(3)

        def call(self, ids: Tensor, training: bool | None = None) -> Tensor:
            with make.partition(0):
                x = self.hidden(self.embedding(ids))
            with make.partition(1):
                x = x * self.embedding(ids[:, ::-1])
                return self.top(tf.reduce_sum(x, axis=1))

    return TwoUses()


def sparse_gradients(parts: Parts) -> StepFunction:
    """As `supervised`, and sees that the table's gradient stays sparse."""
    inner = supervised(mean_squared_error)(parts)

    def step(x: Any, y: Any) -> dict[str, Any]:
        results = inner(x, y)
        assert isinstance(results["gradients"]["model"][0], tf.IndexedSlices)
        return results

    return step


def complex_numbers(make: Maker) -> Any:
    """A Fourier transform: complex tensors and their gradients cross the border."""

    class Complex(make.Model):
        def __init__(self) -> None:
            super().__init__()
            self.first = keras.layers.Dense(8)
            self.last = keras.layers.Dense(3)

        def call(self, x: Tensor, training: bool | None = None) -> Tensor:
            with make.partition(0):
                waves = tf.signal.fft(tf.cast(self.first(x), tf.complex64))
            with make.partition(1):
                return self.last(tf.abs(waves * tf.constant(0.5 + 0.5j, tf.complex64)))

    return Complex()


def _tokens(name: str, parts: Any, **options: Any) -> Case:
    options = {"step": sparse_gradients} | options
    return Case(name, parts, sequences(5, 19, 3), num_stages=3, **options)


CASES = (
    Case("string inputs, StringLookup", strings, strings_batch, supervised(), num_stages=3),
    Case("strings across a border", strings_across, strings_batch, supervised(), layouts=TWO),
    Case(
        "Normalization, Discretization, CategoryEncoding",
        preprocessing,
        four_features,
        supervised(),
        num_stages=3,
        layouts=TWO,
    ),
    _tokens("integers and booleans across borders", integers_across, layouts=TWO),
    _tokens("sparse gradients, table used twice", two_uses_of_a_table, layouts=TWO),
    _tokens("sparse gradients, pattern 0-1-0", integers_across, layouts=CYCLIC[:1]),
    Case("complex numbers across a border", complex_numbers, four_features, supervised()),
)
