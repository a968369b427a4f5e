"""Small compiled models and data for the tests of saving."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

import opensmp as smp

X = np.random.default_rng(0).normal(size=(16, 5)).astype("float32")
Y = np.random.default_rng(1).normal(size=(16, 3)).astype("float32")


def functional(compiled: bool = True, units: int = 4) -> keras.Model:
    """Dense, BatchNormalization, Dropout, Dense; Adam, mean squared error."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5,), name="features")
    x = keras.layers.Dense(units, activation="tanh", name="hidden")(inputs)
    x = keras.layers.BatchNormalization(name="norm")(x)
    outputs = keras.layers.Dense(3, name="top")(x)
    return _compiled(keras.Model(inputs, outputs, name="net"), compiled)


def sequential(compiled: bool = True) -> keras.Model:
    """Two dense layers."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(4, activation="tanh"), keras.layers.Dense(3)]
    return _compiled(keras.Sequential([keras.Input((5,)), *layers]), compiled)


def _compiled(model: keras.Model, compiled: bool) -> keras.Model:
    if compiled:
        model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])
    return model


def _add_layers(model: keras.Model) -> None:
    model.hidden = keras.layers.Dense(4, activation="tanh")
    model.drop = keras.layers.Dropout(0.5)
    model.top = keras.layers.Dense(3)


@keras.saving.register_keras_serializable("opensmp_tests")
class Plain(keras.Model):
    """A subclassed plain model."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _add_layers(self)

    def call(self, x: Any, training: Any = None) -> Any:
        return self.top(self.drop(self.hidden(x), training=training))


@keras.saving.register_keras_serializable("opensmp_tests")
class Split(smp.DistributedModel):
    """The same layers in a model that places them."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _add_layers(self)

    def call(self, x: Any, training: Any = None) -> Any:
        with smp.partition(0):
            x = self.drop(self.hidden(x), training=training)
        with smp.partition(1):
            return self.top(x)


def same(left: Any, right: Any) -> None:
    """Asserts that two lists of arrays or variables have equal bits."""
    left, right = list(left), list(right)
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
