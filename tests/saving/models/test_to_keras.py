from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from saving.sample_models import Plain, Split, X, Y, functional, sequential

import opensmp as smp
from opensmp.errors import SavingError

MANUAL = {"partitions": 2, "microbatches": 2, "auto_partition": False, "default_partition": 0}


@pytest.mark.parametrize("make", [functional, sequential, Plain])
def test_a_view_gives_its_plain_class_back(smp_init, make):
    smp_init(MANUAL)
    original = make()
    model = smp.DistributedModel.from_keras(original)
    expected = np.asarray(model(X))
    plain = model.to_keras()
    assert type(plain) is type(original)
    np.testing.assert_allclose(plain(X), expected, rtol=1e-6, atol=1e-6)
    assert all(a is b for a, b in zip(plain.variables, model.variables, strict=True))


def test_a_functional_distributed_model_gives_a_functional_one(smp_init):
    smp_init(MANUAL)
    inputs = keras.Input((5,))
    with smp.partition(1):
        outputs = keras.layers.Dense(2)(inputs)
    model = smp.DistributedModel(inputs, outputs)
    model(X)
    assert type(model.to_keras()) is type(keras.Model(inputs, outputs))


def test_it_trains_as_a_plain_model_and_the_distributed_one_sees_it(smp_init):
    smp_init(MANUAL)
    model = smp.DistributedModel.from_keras(functional())
    reference = functional()
    model(X)
    plain = model.to_keras()
    for each in (plain, reference):
        each.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    for a, b in zip(model.variables, reference.variables, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_subclass_becomes_a_functional_model_of_its_layers(smp_init):
    smp_init(MANUAL)
    model = Split()
    expected = np.asarray(model(X))
    model.compile("sgd", "mse")
    plain = model.to_keras()
    assert not isinstance(plain, smp.DistributedModel)
    assert not any("opensmp" in kind.__module__ for kind in type(plain).__mro__)
    np.testing.assert_allclose(plain(X), expected, rtol=1e-6, atol=1e-6)
    assert plain.optimizer is model.optimizer
    # Dropout still knows whether it trains.
    assert not np.allclose(plain(X, training=True), expected)


class Raw(smp.DistributedModel):
    def __init__(self):
        super().__init__()
        self.top = keras.layers.Dense(3)

    def call(self, x):
        return self.top(tf.raw_ops.Relu(features=x))


class Moody(smp.DistributedModel):
    def __init__(self):
        super().__init__()
        self.top = keras.layers.Dense(3)

    def call(self, x, training=None):
        x = self.top(x)
        return keras.ops.relu(x) if training else x


class Weighted(smp.DistributedModel):
    def __init__(self):
        super().__init__()
        self.scale = self.add_weight(shape=(), initializer="ones")

    def call(self, x):
        return x * self.scale


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Raw, "TensorFlow function"),
        (Moody, "in training than in inference"),
        (Weighted, "weights outside of any layer|KerasTensor"),
    ],
)
def test_a_call_that_is_no_graph_of_layers_is_refused_with_a_way_out(smp_init, kind, why):
    smp_init(MANUAL)
    model = kind()
    model(X)
    with pytest.raises(SavingError, match=f"(?s)({why}).*from_keras.*save_model") as caught:
        model.to_keras()
    assert kind.__name__ in str(caught.value)


def test_a_model_that_was_not_called_is_refused(smp_init):
    smp_init(MANUAL)
    with pytest.raises(SavingError, match="has not been called yet"):
        Split().to_keras()
