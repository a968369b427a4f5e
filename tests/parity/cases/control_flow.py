"""Raw TensorFlow inside `call`: loops, branches, functions and gradients of one's own."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from parity.bounds import REASSOCIATED
from parity.case import CYCLIC, TWO, Case, evaluation, supervised, vectors
from parity.layout import Maker

Tensor = Any


def in_the_middle(middle: Any, *, own_layer: Any = None) -> Any:
    """A model of three stages whose middle one is `middle(layer, x)`."""

    def model(make: Maker) -> Any:
        class InTheMiddle(make.Model):
            def __init__(self) -> None:
                super().__init__()
                self.first = keras.layers.Dense(8, activation="tanh")
                self.layer = own_layer() if own_layer else keras.layers.Dense(8)
                self.last = keras.layers.Dense(3)

            def call(self, x: Tensor, training: bool | None = None) -> Tensor:
                with make.partition(0):
                    x = self.first(x)
                with make.partition(1):
                    x = middle(self.layer, x)
                with make.partition(2):
                    return self.last(x)

        return InTheMiddle()

    return model


def while_loop(layer: Any, x: Tensor) -> Tensor:
    """The body reads the layer's variables; the number of rounds depends on the data."""

    def body(i: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return i + 1, tf.tanh(layer(h)) + 0.5 * h

    def condition(i: Tensor, h: Tensor) -> Tensor:
        return tf.logical_and(i < 4, tf.reduce_max(tf.abs(h)) < 2.0)

    layer(x[:0])  # makes the variables, which a loop body cannot
    return tf.while_loop(condition, body, [0, x])[1]


def condition(layer: Any, x: Tensor) -> Tensor:
    """Both branches read the layer's variables."""
    layer(x[:0])
    return tf.cond(tf.reduce_sum(x) > 0.0, lambda: tf.nn.relu(layer(x)), lambda: x * 2.0 - layer(x))


def switch(layer: Any, x: Tensor) -> Tensor:
    """One of three branches, only one of them reads the variables."""
    layer(x[:0])
    index = tf.cast(tf.math.floormod(tf.math.round(tf.reduce_sum(x)), 3.0), tf.int32)
    return tf.switch_case(index, [lambda: layer(x), lambda: x + 1.0, lambda: tf.sin(x)])


def scan(layer: Any, x: Tensor) -> Tensor:
    layer(x[:0])
    steps = tf.scan(lambda h, i: tf.tanh(layer(h)) * tf.cast(i, h.dtype), tf.range(1, 4), x)
    return tf.reduce_sum(steps, axis=0)


def mapped(layer: Any, x: Tensor) -> Tensor:
    layer(x[:0])
    return tf.map_fn(lambda row: layer(row[None])[0] * tf.reduce_sum(row), x)


def tensor_array_across_cut(make: Maker) -> Any:
    """Filled in one stage, read in the next: a variant crosses the border."""

    class Arrays(make.Model):
        def __init__(self) -> None:
            super().__init__()
            self.layers_of_stages = [keras.layers.Dense(8, activation="tanh") for _ in range(3)]

        def call(self, x: Tensor, training: bool | None = None) -> Tensor:
            array = tf.TensorArray(tf.float32, size=3, element_shape=x.shape)
            with make.partition(0):
                x = self.layers_of_stages[0](x)
                for i in range(3):
                    array = array.write(i, x * (i + 1.0))
            with make.partition(1):
                x = self.layers_of_stages[1](array.stack()[1] + array.read(2))
            with make.partition(2):
                return self.layers_of_stages[2](x)

    return Arrays()


@tf.custom_gradient
def clipped_exponential(x: Tensor) -> Any:
    """A gradient of one's own, from an inner value of the forward pass."""
    y = tf.exp(tf.minimum(x, 2.0))
    inner = y * 0.5 + 1.0

    def gradient(upstream: Tensor) -> Tensor:
        return tf.clip_by_value(upstream, -0.1, 0.1) * inner

    return y, gradient


def custom_gradient(layer: Any, x: Tensor) -> Tensor:
    return layer(clipped_exponential(x)) + clipped_exponential(layer(x) * 0.1)


def custom_gradient_with_variables(layer: Any, x: Tensor) -> Tensor:
    """The function with the gradient of its own reads variables."""
    layer(x[:0])

    @tf.custom_gradient
    def call(h: Tensor, kernel: Tensor, bias: Tensor) -> Any:
        y = tf.matmul(h, kernel) + bias

        def gradient(upstream: Tensor) -> tuple[Tensor, ...]:
            upstream = upstream * 0.5
            return (
                tf.matmul(upstream, kernel, transpose_b=True),
                tf.matmul(h, upstream, transpose_a=True),
                tf.reduce_sum(upstream, axis=0),
            )

        return y, gradient

    return call(x, tf.convert_to_tensor(layer.kernel), tf.convert_to_tensor(layer.bias))


def custom_gradient_that_reads(layer: Any, x: Tensor) -> Tensor:
    """The function reads variables that it does not take as arguments."""
    layer(x[:0])

    @tf.custom_gradient
    def call(h: Tensor) -> Any:
        kernel = tf.convert_to_tensor(layer.kernel)
        y = tf.matmul(h, kernel) + layer.bias

        def gradient(upstream: Tensor, variables: Any = None) -> Any:
            shapes = {2: tf.matmul(h, upstream, transpose_a=True), 1: tf.reduce_sum(upstream, 0)}
            of_variables = [3.0 * shapes[len(each.shape)] for each in variables]
            return tf.matmul(upstream, kernel, transpose_b=True), of_variables

        return y, gradient

    return call(x)


def recomputed_layer(layer: Any, x: Tensor) -> Tensor:
    """`tf.recompute_grad` of a layer, which reads its variables anew in the backward pass."""
    layer(x[:0])
    return tf.recompute_grad(layer)(x)


def recomputed(layer: Any, x: Tensor) -> Tensor:
    """`tf.recompute_grad` runs its function again in the backward pass."""
    layer(x[:0])

    def call(h: Tensor, kernel: Tensor) -> Tensor:
        return tf.tanh(tf.matmul(h, kernel)) * h

    return tf.recompute_grad(call)(x, tf.convert_to_tensor(layer.kernel))


def nested_function(layer: Any, x: Tensor) -> Tensor:
    layer(x[:0])

    @tf.function
    def call(h: Tensor) -> Tensor:
        return tf.nn.softplus(layer(h)) * h

    return call(call(x))


def autographed(layer: Any, x: Tensor) -> Tensor:
    """A nested `tf.function` with Python control flow on tensors."""
    layer(x[:0])

    @tf.function
    def call(h: Tensor) -> Tensor:
        for _ in tf.range(3):
            if tf.reduce_mean(h) > 0.0:
                h = layer(h)
                h = tf.tanh(h)
            else:
                h = h + 0.1
        return h

    return call(x)


def lambda_layer() -> Any:
    return keras.layers.Lambda(lambda x: tf.math.tanh(x) * 2.0 + tf.sort(x, axis=-1))


def stopped(layer: Any, x: Tensor) -> Tensor:
    return layer(tf.stop_gradient(x)) + tf.stop_gradient(layer(x)) * x


def in_the_middle_of_nothing(layer: Any, x: Tensor) -> Tensor:
    """All of the middle stage lies behind a stopped gradient."""
    return tf.stop_gradient(layer(x))


def rearranged(layer: Any, x: Tensor) -> Tensor:
    """Operations whose gradients are sparse, indexed or of other shapes than usual."""
    top, indices = tf.math.top_k(layer(x), 4)
    gathered = tf.gather(x, indices, batch_dims=1, axis=1)
    first, second = tf.split(tf.concat([top, gathered], -1), [3, 5], axis=-1)
    scattered = tf.scatter_nd([[0], [2]], tf.reduce_sum(second, 0)[:2], [8])
    return tf.pad(first, [[0, 0], [0, 5]]) + scattered + tf.einsum("bi,bj->bi", x, second)


def _middle(name: str, middle: Any, own_layer: Any = None, **options: Any) -> Case:
    model = in_the_middle(middle, own_layer=own_layer)
    options = {"layouts": TWO} | options
    return Case(name, model, vectors(5, 3), supervised(), num_stages=3, **options)


CASES = (
    _middle("tf.while_loop with variables", while_loop, evaluate=evaluation()),
    _middle("tf.while_loop, pattern 0-1-0", while_loop, layouts=CYCLIC[:1]),
    _middle("tf.cond with variables", condition),
    _middle("tf.switch_case", switch),
    _middle("tf.scan", scan),
    _middle("tf.map_fn", mapped),
    Case(
        "TensorArray across a border",
        tensor_array_across_cut,
        vectors(8, 8),
        supervised(),
        num_stages=3,
        layouts=TWO,
    ),
    _middle("tf.custom_gradient", custom_gradient, bound=REASSOCIATED),
    _middle("tf.custom_gradient over variables", custom_gradient_with_variables),
    _middle("tf.custom_gradient that reads variables", custom_gradient_that_reads),
    _middle("tf.recompute_grad", recomputed),
    _middle("tf.recompute_grad of a layer", recomputed_layer),
    _middle("nested tf.function", nested_function),
    _middle("nested tf.function with AutoGraph", autographed),
    _middle("Lambda", lambda layer, x: layer(x), lambda_layer),
    _middle("tf.stop_gradient", stopped, bound=REASSOCIATED),
    _middle("stage behind tf.stop_gradient", in_the_middle_of_nothing),
    _middle("gather, scatter, top_k, einsum", rearranged),
)
