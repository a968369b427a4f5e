"""Steps in a `tf.function` that reads weights and computes with gradients, wherever they are.

Each program gives numbers; what is expected is computed by plain Keras over the same batch.
"""

from __future__ import annotations

import sys
import traceback
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import opensmp as smp


def net(seed: int = 1) -> Any:
    keras.utils.set_random_seed(seed)
    layers = [
        keras.layers.Dense(8, "tanh", bias_initializer="ones"),
        keras.layers.Dense(4, bias_initializer="ones"),
    ]
    return keras.Sequential([keras.Input((6,)), *layers])


def data() -> tuple[Any, Any]:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(8, 6)), random.normal(size=(8, 4))
    return tf.constant(x, tf.float32), tf.constant(y, tf.float32)


def loss_of(model: Any, x: Any, y: Any) -> Any:
    return tf.reduce_mean((model(x, training=True) - y) ** 2)


class Both:
    """A plain model and a split one, and a step of each that gives gradients and loss."""

    def __init__(self, seed: int = 1) -> None:
        self.plain = net(seed)
        self.split = smp.DistributedModel.from_keras(net(seed))

        @smp.step
        def split_step(x: Any, y: Any) -> Any:
            with tf.GradientTape() as tape:
                loss = loss_of(self.split, x, y)
            return tape.gradient(loss, self.split.trainable_variables), loss

        def plain_step(x: Any, y: Any) -> Any:
            with tf.GradientTape() as tape:
                loss = loss_of(self.plain, x, y)
            return tape.gradient(loss, self.plain.trainable_variables), loss

        self._split_step, self._plain_step = split_step, plain_step

    def step(self, model: Any) -> Any:
        x, y = data()
        if model is self.plain:
            return self._plain_step(x, y)
        gradients, loss = self._split_step(x, y)
        gradients = [smp.allreduce(g.accumulate()) for g in gradients]
        return gradients, smp.allreduce(loss.reduce_mean())

    def compare(self, program: Any, optimizer: Any = lambda: keras.optimizers.SGD(0.1)) -> None:
        results = []
        for model in (self.plain, self.split):
            own = optimizer()

            @tf.function
            def run(model: Any = model, own: Any = own) -> Any:
                return program(self, model, own)

            values = [run(), run(), run()]
            results.append(tf.nest.flatten([values, model.get_weights()]))
        for number, (a, b) in enumerate(zip(*results, strict=True)):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=str(number))


def norms() -> None:
    def program(both: Both, model: Any, optimizer: Any) -> Any:
        gradients, loss = both.step(model)
        weights = model.trainable_variables
        optimizer.apply_gradients(zip(gradients, weights, strict=True))
        return [
            loss,
            [tf.norm(g) for g in gradients],
            tf.linalg.global_norm(gradients),
            tf.linalg.global_norm([v.value for v in weights]),
            [tf.reduce_max(g / 2.0) for g in gradients],
        ]

    Both().compare(program)


def clipping() -> None:
    def program(both: Both, model: Any, optimizer: Any) -> Any:
        gradients, loss = both.step(model)
        clipped, norm = tf.clip_by_global_norm(gradients, 0.3)
        optimizer.apply_gradients(zip(clipped, model.trainable_variables, strict=True))
        return [loss, norm, tf.linalg.global_norm(clipped)]

    Both().compare(program)


def clipping_by_smp() -> None:
    def program(both: Both, model: Any, optimizer: Any) -> Any:
        gradients, loss = both.step(model)
        clip = tf.clip_by_global_norm if model is both.plain else smp.clip_by_global_norm
        clipped, norm = clip(gradients, 0.3)
        optimizer.apply_gradients(zip(clipped, model.trainable_variables, strict=True))
        return [loss, norm, [tf.reduce_sum(g) for g in clipped]]

    Both().compare(program)


def arithmetic() -> None:
    def program(both: Both, model: Any, optimizer: Any) -> Any:
        gradients, loss = both.step(model)
        weights = model.trainable_variables
        changed = []
        for g, v in zip(gradients, weights, strict=True):
            assert len(g.shape) == len(v.shape)
            centred = g - tf.reduce_mean(g) if len(g.shape) > 1 else g
            changed.append(centred + 0.01 * v * tf.norm(g))
        optimizer.apply_gradients(zip(changed, weights, strict=True))
        return loss

    Both().compare(program)


def penalties_outside_of_the_step() -> None:
    def program(both: Both, model: Any, optimizer: Any) -> Any:
        gradients, loss = both.step(model)
        weights = model.trainable_variables
        with tf.GradientTape() as tape:
            penalty = tf.add_n([tf.reduce_sum(v.value**2) for v in weights]) ** 2
        more = tape.gradient(penalty, weights)
        both_of_them = [a + 0.001 * b for a, b in zip(gradients, more, strict=True)]
        optimizer.apply_gradients(zip(both_of_them, weights, strict=True))
        return [loss, penalty]

    Both().compare(program)


def another_model() -> None:
    """A step that reads weights of a model that it does not call."""
    both, other = Both(), Both(2)

    @smp.step
    def distance(x: Any) -> Any:
        outputs = both.split(x)
        pairs = zip(both.split.weights, other.split.weights, strict=True)
        apart = tf.add_n([tf.reduce_sum((a.value - b.value) ** 2) for a, b in pairs])
        return tf.reduce_mean(outputs) * 0.0 + apart

    x, _ = data()
    other.split(x)
    both.split(x)
    pairs = zip(both.plain.weights, other.plain.weights, strict=True)
    expected = sum(float(tf.reduce_sum((a.value - b.value) ** 2)) for a, b in pairs)
    np.testing.assert_allclose(distance(x).reduce_mean(), expected, rtol=1e-5)


def inference() -> None:
    """A function that calls a model, and no step."""
    both = Both()
    x, _ = data()
    both.split(x)

    @tf.function
    def scaled(model: Any = both.split) -> Any:
        weights = [tf.reduce_sum(v.value) for v in model.weights]
        return model(x * weights[0]) * tf.add_n(weights)

    weights = [tf.reduce_sum(v.value) for v in both.plain.weights]
    expected = both.plain(x * weights[0]) * tf.add_n(weights)
    np.testing.assert_allclose(scaled(), expected, rtol=1e-4, atol=1e-5)


PROGRAMS = [
    norms,
    clipping,
    clipping_by_smp,
    arithmetic,
    penalties_outside_of_the_step,
    another_model,
    inference,
]


def check(names: list[str]) -> None:
    faults = []
    for program in PROGRAMS:
        if not names or program.__name__ in names:
            try:
                program()
            except Exception as error:
                traceback.print_exc()
                faults.append(f"{program.__name__}: {type(error).__name__}: {error}")
    assert not faults, "\n".join(faults)


if __name__ == "__main__":
    smp.init()
    check(sys.argv[1:])
