"""Half precision between processes: the step of a model with casts at the borders."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tensorflow as tf
from processes import check_ranks

MICROBATCHES = 4

MODEL = """
import keras
import numpy as np
import tensorflow as tf

def layers():
    keras.utils.set_random_seed(3)
    return [keras.layers.Dense(6, activation="tanh", name=f"d{i}") for i in range(3)]

x = np.random.default_rng(0).normal(size=(8, 6)).astype("float32")
y = np.random.default_rng(1).normal(size=(8, 6)).astype("float32")
"""

SCRIPT = f"""
import json, sys
import opensmp as smp

settings = json.loads(sys.argv[1])
found = []
for extra in settings:
    smp.init({{"partitions": 2, "microbatches": {MICROBATCHES}, "auto_partition": False,
              "default_partition": 0, **extra}})
    exec({MODEL!r})

    class Net(smp.DistributedModel):
        def __init__(self):
            super().__init__(name="net")
            self.first, self.second, self.third = layers()

        def call(self, x):
            with smp.partition(0):
                x = self.first(x)
            with smp.partition(1):
                x = self.second(x)
            with smp.partition(0):
                return self.third(x)

    model = Net()

    @smp.step
    def forward_backward(x, y):
        with tf.GradientTape() as tape:
            outputs = model(x)
            loss = tf.reduce_mean((outputs - y) ** 2)
        return tape.gradient(loss, model.trainable_variables), loss, outputs

    gradients, loss, outputs = forward_backward(tf.constant(x), tf.constant(y))
    own, here = {{}}, {{variable.path for variable in smp.local_variables(model)}}
    for variable, gradient in zip(model.trainable_variables, gradients):
        if variable.path in here:
            own[variable.path.removeprefix("net/")] = gradient.reduce_mean().numpy().tolist()
    found.append([own, float(loss.reduce_mean()), outputs.concat().numpy().tolist()])
    smp.shutdown()
print(json.dumps(found))
"""


def rounded(dtype: str):
    """Rounds a tensor and its gradient, as they are on the wire."""

    @tf.custom_gradient
    def both_ways(value):
        return tf.cast(tf.cast(value, dtype), tf.float32), lambda g: tf.cast(
            tf.cast(g, dtype), tf.float32
        )

    return both_ways


def expected(dtype: str) -> tuple[dict[str, np.ndarray], float, np.ndarray]:
    """The step of plain Keras with casts at both borders, over the same microbatches."""
    names: dict = {}
    exec(MODEL, names)
    layers, x, y = names["layers"](), names["x"], names["y"]
    border = rounded(dtype)
    sums: dict[str, np.ndarray] = {}
    losses, outputs = [], []
    for part_x, part_y in zip(np.split(x, MICROBATCHES), np.split(y, MICROBATCHES), strict=True):
        with tf.GradientTape() as tape:
            value = layers[2](border(layers[1](border(layers[0](part_x)))))
            loss = tf.reduce_mean((value - part_y) ** 2)
        variables = [v for layer in layers for v in layer.trainable_variables]
        gradients = tape.gradient(loss, [v.value for v in variables])
        for variable, gradient in zip(variables, gradients, strict=True):
            sums[variable.path] = sums.get(variable.path, 0) + gradient.numpy() / MICROBATCHES
        losses.append(float(loss))
        outputs.append(value.numpy())
    return sums, float(np.mean(losses)), np.concatenate(outputs)


CASES = [
    {"wire_dtype": "bfloat16"},
    {"wire_dtype": "bfloat16", "transport": "collective", "pipeline": "simple"},
    {"wire_dtype": "float16", "recompute": "full"},
    {"wire_dtype": "none"},
]


def test_steps_are_those_of_plain_keras_with_casts_at_the_borders():
    results = [json.loads(r.lines[-1]) for r in check_ranks(SCRIPT, 2, args=(json.dumps(CASES),))]
    exact = expected("float32")
    for case, *ranks in zip(CASES, *results, strict=True):
        dtype = case["wire_dtype"].replace("none", "float32")
        gradients, loss, outputs = expected(dtype)
        seen: set[str] = set()
        for own, found_loss, found_outputs in ranks:
            assert found_loss == pytest.approx(loss, rel=1e-6)
            np.testing.assert_allclose(found_outputs, outputs, rtol=1e-6, atol=1e-7)
            for path, gradient in own.items():
                np.testing.assert_allclose(gradient, gradients[path], rtol=1e-6, atol=1e-7)
            seen |= set(own)
        assert seen == set(gradients)
        # The casts are there, so that the comparison says something.
        assert (abs(loss - exact[1]) > 1e-6) == (dtype != "float32")


def test_no_other_type_is_taken():
    from opensmp.config import Config
    from opensmp.errors import ConfigError

    with pytest.raises(ConfigError, match=r"wire_dtype.*'none', 'bfloat16' or 'float16'"):
        Config.resolve({"partitions": 2, "wire_dtype": "int8"})
