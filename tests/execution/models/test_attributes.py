"""Eager calls of a split model see what Python has changed in it since, as those of plain Keras."""

from __future__ import annotations

import collections
import dataclasses
import functools
import types
import weakref
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from processes import check_ranks
from small import TWO_BY_TWO

import opensmp as smp
from opensmp.execution.models import registry
from opensmp.execution.models.attributes import attributes

X = tf.constant(np.arange(-8, 8, dtype="float32").reshape(4, 4) / 4)


@dataclasses.dataclass
class Settings:
    scale: float = 1.0


class Helper:
    factor = 1.0

    def __init__(self) -> None:
        self.scale = 1.0
        self.numbers = Numbers([1.0])  # as an attribute of the model it would be a list of Keras

    def times(self, x: Any) -> Any:
        return x * self.scale * self.factor


class Numbers(list):
    scale = 1.0


def chain(length: int) -> Settings:
    """Objects in objects; the innermost has the scale."""
    settings = Settings()
    for _ in range(length):
        settings, inner = Settings(), settings
        settings.inner = inner
    return settings


def end_of(settings: Any) -> Any:
    while hasattr(settings, "inner"):
        settings = settings.inner
    return settings


class Slotted:
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 1.0


class Net(keras.Model):
    """Reads an attribute of each kind in its call."""

    shift = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.low = keras.layers.Dense(4, activation="relu", name="low")
        self.norm = keras.layers.BatchNormalization(name="norm")
        self.drop = keras.layers.Dropout(0.3, seed=1, name="drop")
        self.high = keras.layers.Dense(2, name="high")
        self.number, self.flag, self.text = 1.0, False, "sum"
        self.tensor: Any = None
        self.array = np.ones(4, "float32")
        self.options = {"power": 1.0, "list": [1.0]}
        self.settings = Settings()
        self.function = functools.partial(tf.multiply, 1.0)
        self.names, self.recent = {"one"}, collections.deque([1.0])
        self.nested = [[[[[{"deep": [1.0]}]]]]]
        self.objects = np.array([{"scale": 1.0}], dtype=object)
        self.slotted, self.space = Slotted(), types.SimpleNamespace(scale=1.0)
        self.helper = Helper()
        self.method, self.chain = self.helper.times, chain(8)
        self.bytes = bytearray(b"\x01")
        self.options_class = type("Options", (), {"scale": 1.0})
        self.calls_seen = 0

    def call(self, x: Any, training: Any = None) -> Any:
        self.calls_seen += 1
        x = self.drop(self.norm(self.low(x), training=training), training=training)
        x = x * self.number * self.settings.scale * tf.constant(self.array)
        if self.flag:
            x = -x
        if self.text == "square":
            x = x * x
        if self.tensor is not None:
            x = x * self.tensor
        x = x * len(self.names) * self.recent[-1] * self.nested[0][0][0][0][0]["deep"][0]
        x = x * self.objects[0]["scale"] * self.slotted.scale * self.space.scale
        x = self.method(x) * end_of(self.chain).scale * self.helper.numbers.scale * self.bytes[0]
        x = x * self.options_class.scale + self.shift
        x = self.function(x * self.options["power"] * self.options["list"][0])
        return self.high(x)


CHANGES = {
    "a number": lambda net: setattr(net, "number", 2.0),
    "a flag": lambda net: setattr(net, "flag", True),
    "a text": lambda net: setattr(net, "text", "square"),
    "a tensor": lambda net: setattr(net, "tensor", tf.constant(3.0)),
    "an array": lambda net: setattr(net, "array", np.full(4, 2.0, "float32")),
    "an array in place": lambda net: net.array.__setitem__(0, 7.0),
    "an entry of a dict": lambda net: net.options.__setitem__("power", 3.0),
    "an entry of a list in a dict": lambda net: net.options["list"].__setitem__(0, 3.0),
    "a field of an object": lambda net: setattr(net.settings, "scale", 4.0),
    "a set in place": lambda net: net.names.add("two"),
    "a queue in place": lambda net: net.recent.append(3.0),
    "far inside of lists": lambda net: net.nested[0][0][0][0][0]["deep"].__setitem__(0, 3.0),
    "a dict in an array of objects": lambda net: net.objects[0].__setitem__("scale", 3.0),
    "a slot of an object": lambda net: setattr(net.slotted, "scale", 3.0),
    "a namespace": lambda net: setattr(net.space, "scale", 3.0),
    "the object of a method": lambda net: setattr(net.helper, "scale", 3.0),
    "the class of an object": lambda net: setattr(Helper, "factor", 3.0),
    "the class of the model": lambda net: setattr(Net, "shift", 3.0),
    "a class as an attribute": lambda net: setattr(net.options_class, "scale", 3.0),
    "objects in objects": lambda net: setattr(end_of(net.chain), "scale", 3.0),
    "an attribute of a list": lambda net: setattr(net.helper.numbers, "scale", 3.0),
    "bytes in place": lambda net: net.bytes.__setitem__(0, 3),
    "a function": lambda net: setattr(net, "function", functools.partial(tf.multiply, 5.0)),
    "the activation of a layer": lambda net: setattr(net.low, "activation", tf.nn.elu),
    "the rate of a layer": lambda net: setattr(net.drop, "rate", 0.6),
    "a frozen normalization": lambda net: setattr(net.norm, "trainable", False),
}


# In a graph TensorFlow adds up in another order than eagerly: the last bits of float32 differ.
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def nets() -> tuple[Any, Any]:
    """A plain model and a split one of the same weights."""
    plain, other = Net(), Net()
    plain(X)
    other(X)
    other.set_weights(plain.get_weights())
    return plain, smp.DistributedModel.from_keras(other)


@pytest.mark.parametrize("change", CHANGES)
def test_an_eager_call_sees_it(smp_init, monkeypatch, change):
    smp_init(TWO_BY_TWO)
    monkeypatch.setattr(Net, "shift", 0.0)  # and back after the test
    monkeypatch.setattr(Helper, "factor", 1.0)
    plain, split = nets()
    for training in (False, True):
        close(split(X, training=training), plain(X, training=training))
    for net in (plain, split):
        CHANGES[change](net)
    for training in (False, True):
        found = split(X, training=training)
        close(found, plain(X, training=training))


def test_ten_changes_one_after_the_other_and_back(smp_init):
    smp_init(TWO_BY_TWO)
    plain, split = nets()
    for number in [*range(10), 3, 3, 0]:
        plain.number = split.number = float(number)
        close(split(X), plain(X))


def test_without_a_change_nothing_is_traced_again(smp_init):
    smp_init(TWO_BY_TWO)
    _, split = nets()
    split(X)
    traces = split.calls_seen
    for _ in range(12):
        split(X)
    assert split.calls_seen == traces
    split.number = 2.0
    split(X)
    assert split.calls_seen > traces


def test_training_in_between_makes_no_call_be_traced_again(smp_init):
    smp_init(TWO_BY_TWO)
    model = tempered(True)
    model.compile(keras.optimizers.SGD(0.01))
    model.temperature = 7.0  # which the train_step leaves
    model.fit(X, batch_size=4, verbose=0)
    model(X)
    TRACED.clear()
    for _ in range(3):
        model.fit(X, batch_size=4, verbose=0)
        model(X)
    assert TRACED == []


def test_a_functional_model_whose_layer_changes(smp_init):
    smp_init(TWO_BY_TWO)
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(3, activation="relu")(inputs)
    plain = keras.Model(inputs, keras.layers.Dense(2)(hidden))
    split = smp.DistributedModel.from_keras(plain)
    before = split(X)
    plain.layers[1].activation = tf.nn.softplus
    assert not np.allclose(split(X), before)
    close(split(X), plain(X))


def test_what_is_compared_is_equal_until_something_changes():
    net = Net()
    net(X)
    net.array[0] = np.nan
    net.number = float("nan")
    assert attributes(net) == attributes(net)
    net.loop = [net.options]
    net.options["self"] = Settings(scale=net)
    assert attributes(net) == attributes(net)


TRACED: list[float] = []  # at which temperature Tempered was called by Python


class Tempered(keras.Model):
    """Its own train_step calls it at two temperatures, and sets a third before the gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.low = keras.layers.Dense(4, name="low")
        self.high = keras.layers.Dense(2, name="high")
        self.temperature = 1.0

    def call(self, x: Any) -> Any:
        TRACED.append(self.temperature)
        return self.high(tf.nn.relu(self.low(x)) * self.temperature)

    def at(self, temperature: float, x: Any) -> Any:
        self.temperature = temperature
        return self(x)

    def loss_of(self, x: Any) -> Any:
        first, second = self.at(1.0, x), self.at(2.0, x)
        self.temperature = 7.0
        return tf.reduce_mean(first**2) + 3.0 * tf.reduce_mean(second**3)

    def train_step(self, data: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = self.loss_of(data)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"own": loss}


def tempered(split: bool) -> Any:
    keras.utils.set_random_seed(0)
    model = Tempered()
    model(X)
    return smp.DistributedModel.from_keras(model) if split else model


def test_two_calls_of_a_train_step_have_attributes_of_their_own(smp_init):
    smp_init(TWO_BY_TWO)
    found = []
    for split in (False, True):
        model = tempered(split)
        model.compile(keras.optimizers.SGD(0.01))
        history = model.fit(X, batch_size=4, epochs=12, verbose=0, shuffle=False).history["own"]
        found.append([history, *model.get_weights()])
    for plain, ours in zip(*found, strict=True):
        close(ours, plain)


def test_states_that_come_back_are_not_traced_again(smp_init):
    smp_init(TWO_BY_TWO)
    plain, split = tempered(False), tempered(True)
    for temperature in (1.0, 2.0, 3.0):
        close(split.at(temperature, X), plain.at(temperature, X))
    expected = {temperature: plain.at(temperature, X) for temperature in (3.0, 1.0, 2.0)}
    TRACED.clear()
    for _ in range(3):
        for temperature in expected:
            close(split.at(temperature, X), expected[temperature])
    assert TRACED == []
    for temperature in np.linspace(4.0, 9.0, 11):  # more than are kept
        close(split.at(temperature, X), plain.at(temperature, X))
    assert len(split._smp_functions) == 4


@pytest.mark.parametrize("microbatches", [2, 4])
def test_two_calls_of_a_step_have_attributes_of_their_own(smp_init, microbatches, monkeypatch):
    # For a model of an earlier test, not called since smp.init, the step would be traced twice.
    monkeypatch.setattr(registry, "_models", weakref.WeakSet())
    smp_init({**TWO_BY_TWO, "microbatches": microbatches})
    plain, split = tempered(False), tempered(True)

    @smp.step
    def step(x):
        with tf.GradientTape() as tape:
            loss = split.loss_of(x)
        return tape.gradient(loss, split.trainable_variables), loss

    split(X)  # which makes the places of the variables
    TRACED.clear()
    gradients, losses = step(X)
    assert TRACED == [1.0, 2.0]  # a trace serves all microbatches
    expected = []
    for rows in tf.split(X, microbatches):
        with tf.GradientTape() as tape:
            loss = plain.loss_of(rows)
        expected.append([loss, *tape.gradient(loss, plain.trainable_variables)])
    for ours, those in zip([losses, *gradients], zip(*expected, strict=True), strict=True):
        close(ours.outputs, those)


IN_RANKS = """
import keras, numpy as np, tensorflow as tf
import opensmp as smp
smp.init({"partitions": 2, "microbatches": 2})

class Net(keras.Model):
    def __init__(self):
        super().__init__()
        self.low = keras.layers.Dense(4, kernel_initializer="ones")
        self.high = keras.layers.Dense(2, kernel_initializer="ones")
        self.temperature = 1.0

    def call(self, x):
        return self.high(tf.nn.relu(self.low(x)) / self.temperature)

net = smp.DistributedModel.from_keras(Net())
x = tf.ones((4, 4))
print([float(tf.reduce_sum(net(x))) for net.temperature in (1.0, 2.0, 4.0, 4.0, 1.0)], flush=True)
"""


def test_all_ranks_see_it():
    for rank in check_ranks(IN_RANKS, 2):
        assert rank.lines[-1] == "[128.0, 64.0, 32.0, 32.0, 128.0]", rank.output
