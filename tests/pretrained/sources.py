"""A small pretrained model, files of it, and the ways to use it inside another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np

import opensmp as smp

X = np.random.default_rng(0).normal(size=(8, 5)).astype("float32")
Y = np.random.default_rng(1).normal(size=(8, 1)).astype("float32")
HEAD_BYTES = 4 * (12 + 1)


def pretrained() -> keras.Model:
    """Dense layers with BatchNormalization between them, trained a little."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((5,))
    x = keras.layers.Dense(12, activation="tanh", name="one")(inputs)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.Dense(12, activation="tanh", name="two")(x)
    outputs = keras.layers.Dense(12, activation="tanh", name="three")(x)
    model = keras.Model(inputs, outputs, name="pretrained")
    model.compile("sgd", "mse")
    model.fit(X, np.zeros((8, 12)), verbose=0)
    return model


def from_file(folder: Path, source: str) -> keras.Model:
    """The model, from a file in a format."""
    path = folder / {"keras": "p.keras", "h5": "p.h5", "saved_model": "p"}[source]
    if not path.exists():
        smp.save_model(pretrained(), path)
    return smp.load_model(path, distribute=False)


def head() -> keras.layers.Layer:
    """The new layer on top."""
    return keras.layers.Dense(1, kernel_initializer="ones", name="head")


def functional(model: keras.Model) -> keras.Model:
    """As a layer of a Functional model."""
    inputs = keras.Input((5,))
    return keras.Model(inputs, head()(model(inputs)))


def sequential(model: keras.Model) -> keras.Model:
    """As the first of a stack."""
    return keras.Sequential([model, head()])


class Custom(keras.Model):
    """As an attribute of a subclassed model."""

    def __init__(self, model: keras.Model) -> None:
        super().__init__()
        self.pretrained = model
        self.head = head()

    def call(self, inputs: Any) -> Any:
        return self.head(self.pretrained(inputs))


def in_lambda(model: keras.Model) -> keras.Model:
    """In a Lambda layer, whose weights Keras does not know, so that they are never trained."""
    wrapped = keras.layers.Lambda(lambda x: model(x), output_shape=(12,))
    return keras.Sequential([keras.Input((5,)), wrapped, head()])


WAYS = {
    "functional": functional,
    "subclass": Custom,
    "sequential": sequential,
    "lambda": in_lambda,
}
