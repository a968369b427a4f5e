"""Models whose graph is more than a chain of operations: loops, branches, functions, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from parity.bounds import BIT_EQUAL, REASSOCIATED
from parity.case import TWO, Case, evaluation, supervised, vectors
from parity.layout import Maker

Tensor = Any


def around(middle: Callable[[Any, Tensor], Tensor]) -> Callable[[Maker], Any]:
    """A model with `middle(model, x)` as the second of three stages."""

    def parts(make: Maker) -> Any:
        class Around(make.Model):
            def __init__(self) -> None:
                super().__init__()
                self.first = keras.layers.Dense(8, activation="tanh")
                self.inner = keras.layers.Dense(8)
                self.last = keras.layers.Dense(3)

            def call(self, x: Tensor, training: bool | None = None) -> Tensor:
                with make.partition(0):
                    x = self.first(x)
                with make.partition(1):
                    x = middle(self, x)
                with make.partition(2):
                    return self.last(x)

        return Around()

    return parts


def while_loop(model: Any, x: Tensor) -> Tensor:
    def body(i: Tensor, h: Tensor) -> Any:
        return i + 1, 0.9 * h + tf.sin(h)

    return tf.while_loop(lambda i, h: i < 3, body, [0, x])[1]


def variable_in_loop(model: Any, x: Tensor) -> Tensor:
    """The loop's body reads a variable, and branches on what it has."""
    x = model.inner(x)

    def body(i: Tensor, h: Tensor) -> Any:
        h = tf.cond(
            tf.reduce_sum(h) > 0.0, lambda: tf.tanh(model.inner(h)), lambda: 0.5 * model.inner(h)
        )
        return i + 1, h

    return tf.while_loop(lambda i, h: i < 3, body, [0, x])[1]


def cond(model: Any, x: Tensor) -> Tensor:
    x = model.inner(x)
    return tf.cond(tf.reduce_mean(x) > 0.0, lambda: x * 2.0, lambda: tf.square(x) - 1.0)


def switch_case(model: Any, x: Tensor) -> Tensor:
    chosen = tf.cast(tf.abs(tf.reduce_sum(x)) * 10.0, tf.int32) % 3
    return tf.switch_case(
        chosen, [lambda: model.inner(x), lambda: tf.sin(x), lambda: x * tf.cos(x)]
    )


def nested_function(model: Any, x: Tensor) -> Tensor:
    @tf.function
    def inner(h: Tensor) -> Tensor:
        return tf.sin(h) * 2.0 + tf.nn.relu(model.inner(h))

    return inner(inner(x))


def custom_gradient(model: Any, x: Tensor) -> Tensor:
    """A gradient that is not the derivative, and keeps a forward tensor."""

    @tf.custom_gradient
    def exponential(h: Tensor) -> Any:
        y = tf.exp(0.1 * h)
        return y, lambda upstream: 3.0 * upstream * y

    return exponential(model.inner(x))


def recompute_grad(model: Any, x: Tensor) -> Tensor:
    return tf.recompute_grad(lambda h: tf.sin(tf.exp(0.1 * h)))(model.inner(x))


def stop_gradient(model: Any, x: Tensor) -> Tensor:
    return tf.stop_gradient(model.inner(x)) * 0.5 + x


def tensor_array(model: Any, x: Tensor) -> Tensor:
    array = tf.TensorArray(tf.float32, 3, element_shape=x.shape)
    for i in range(3):
        array = array.write(i, model.inner(x) * float(i + 1))
    return tf.reduce_sum(array.stack(), 0)


def gather_and_scatter(model: Any, x: Tensor) -> Tensor:
    columns = tf.gather(model.inner(x), [0, 3, 3, 5, 7], axis=-1)
    rest = tf.zeros_like(x)[:, 5:]
    return tf.concat([tf.sort(columns, axis=-1), rest], axis=-1)


def control_edge(model: Any, x: Tensor) -> Tensor:
    check = tf.debugging.assert_less(tf.reduce_max(x), 1e6)
    with tf.control_dependencies([check]):
        return tf.identity(model.inner(x))


def array_across(make: Maker) -> Any:
    """A TensorArray filled in one partition and read in the next: a variant is cut."""

    class Across(make.Model):
        def __init__(self) -> None:
            super().__init__()
            self.first = keras.layers.Dense(8)
            self.last = keras.layers.Dense(3)

        def call(self, x: Tensor, training: bool | None = None) -> Tensor:
            with make.partition(0):
                x = self.first(x)
                array = tf.TensorArray(tf.float32, 3, element_shape=x.shape)
                for i in range(3):
                    array = array.write(i, x * float(i + 1))
            with make.partition(1):
                return self.last(tf.reduce_sum(array.stack(), 0))

    return Across()


def lambdas(make: Maker) -> Any:
    class Lambdas(make.Model):
        def __init__(self) -> None:
            super().__init__()
            self.first = keras.layers.Dense(8)
            self.twice = keras.layers.Lambda(lambda x: tf.tanh(x) * 2.0)
            self.last = keras.layers.Dense(3)
            self.shift = keras.layers.Lambda(lambda x: x - tf.reduce_mean(x, -1, keepdims=True))

        def call(self, x: Tensor, training: bool | None = None) -> Tensor:
            with make.partition(0):
                x = self.twice(self.first(x))
            with make.partition(1):
                return self.shift(self.last(x))

    return Lambdas()


_MIDDLES = {
    "tf.while_loop": while_loop,
    "variable in a loop and a branch": variable_in_loop,
    "tf.cond": cond,
    "tf.switch_case": switch_case,
    "nested tf.function": nested_function,
    "tf.custom_gradient": custom_gradient,
    "tf.recompute_grad": recompute_grad,
    "tf.stop_gradient": stop_gradient,
    "TensorArray": tensor_array,
    "gather, sort, slice": gather_and_scatter,
    "control edge between partitions": control_edge,
}

_BOUNDS = {"tf.recompute_grad": REASSOCIATED, "TensorArray": REASSOCIATED}

CASES = (
    *(
        Case(
            name,
            around(middle),
            vectors(8, 3),
            supervised(),
            num_stages=3,
            layouts=TWO,
            evaluate=evaluation(),
            bound=_BOUNDS.get(name, BIT_EQUAL),
        )
        for name, middle in _MIDDLES.items()
    ),
    Case("TensorArray across a cut", array_across, vectors(8, 3), supervised()),
    Case("Lambda layers", lambdas, vectors(8, 3), supervised()),
)
