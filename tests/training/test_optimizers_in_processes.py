"""Optimizers that look at all variables, where these lie in two processes."""

from __future__ import annotations

import keras
from processes import check_ranks
from turns import turn

SCRIPT = """
import keras, numpy as np, tensorflow as tf
import opensmp as smp
smp.init()
from opensmp import _private
from opensmp.saving.gather import gathered
from training.test_optimizers import OPTIONS, ROWS, STEPS, batches, made, model
from training.test_optimizers import train, BUILT_FIRST

def compare(plain, split, one, other, name):
    for mine, theirs in ((split.variables, plain.variables), (other.variables, one.variables)):
        assert len(mine) == len(theirs)
        here = 0
        for a, b in zip(mine, theirs):
            if not _private.is_elsewhere(a):
                here += 1
                np.testing.assert_allclose(np.asarray(a), np.asarray(b), 3e-5, 3e-6, err_msg=name)
        assert 0 < here, name
    assert any(map(_private.is_elsewhere, split.variables)), name
    slots = [v for v in other.variables if tuple(v.shape) == (6, 5)]
    homes = [_private.is_elsewhere(v) for v in split.variables if tuple(v.shape) == (6, 5)]
    assert all(_private.is_elsewhere(s) == homes[0] for s in slots), name
    with gathered(other.variables) as is_whole:  # the state that is saved
        for a, b in zip(other.variables, one.variables):
            if is_whole:
                np.testing.assert_allclose(np.asarray(a), np.asarray(b), 3e-5, 3e-6, err_msg=name)

def check(name, make, way):
    plain, split = model(), smp.DistributedModel.from_keras(model())
    one, other = make(), make()
    if name in BUILT_FIRST:
        one.build(plain.trainable_variables)
        other.build(split.trainable_variables)
    train(plain, one, way)
    train(split, other, way)
    compare(plain, split, one, other, name)
    print("equal", name, way, flush=True)

for name in OPTIMIZERS:
    check(name, OPTIONS.get(name, lambda: made(name)), "loop")
for name in ("use_ema", "all within LossScaleOptimizer"):
    check(name, OPTIONS[name], "fit")
"""

LORA = """
plain, split = model(), smp.DistributedModel.from_keras(model())
for each in (plain, split):
    train(each, keras.optimizers.Adam(0.01), "loop")
for name in ("one", "two", "top"):  # in both processes; the kernel of some is elsewhere
    for each in (plain, split):
        each.get_layer(name).kernel_constraint = None
        each.get_layer(name).enable_lora(2, a_initializer=keras.initializers.HeUniform(seed=3))
one, other = keras.optimizers.Adam(0.01), keras.optimizers.Adam(0.01)
train(plain, one, "loop")
train(split, other, "loop")
compare(plain, split, one, other, "LoRA")
for name in ("one", "two", "top"):
    layer = split.get_layer(name)
    assert len({_private.is_elsewhere(v) for v in layer.weights}) == 1, name
print("equal LoRA loop", flush=True)
"""

OVERFLOW = """
from training.test_precision import Overflowing
keras.utils.set_random_seed(1)
inputs = keras.Input((6,))
h = keras.layers.Dense(6, name="one")(inputs)
h = keras.layers.Dense(6, name="two")(h)
outputs = keras.layers.Dense(4, name="top")(Overflowing()(h))
split = smp.DistributedModel.from_keras(keras.Model(inputs, outputs))
optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01), initial_scale=4.0)

@smp.step
def gradients(x):
    with tf.GradientTape() as tape:
        loss = optimizer.scale_loss(tf.reduce_mean(tf.square(split(x))))
    return tape.gradient(loss, split.trainable_variables)

@tf.function
def train_step(x):
    found = [g.accumulate() for g in gradients(x)]
    optimizer.apply_gradients(zip(found, split.trainable_variables))

def weights():
    return [np.asarray(v) for v in split.variables if not _private.is_elsewhere(v)]

x = np.ones((4, 6), "float32")
before = None
for scale in (1.0, 1e6, 1.0):
    train_step(tf.constant(x * scale))
    after = weights()
    same = before is not None and all(np.array_equal(a, b) for a, b in zip(before, after))
    print("scale", float(optimizer.dynamic_scale), "left out", same, flush=True)
    assert same == (scale > 1), scale
    before = after
assert float(optimizer.dynamic_scale) == 2.0 and int(optimizer.iterations) == 2
"""

SINCE_3_14 = ("ScheduleFreeAdamW", "MultiOptimizer")
"""Optimizers that Keras did not have before 3.14 and 3.15."""


@turn(0, of=2)
def test_what_looks_at_all_variables_is_equal_to_plain_keras():
    """Norms, averages, accumulated gradients, one finite check, factors, many optimizers."""
    names = [
        "global_clipnorm",
        "use_ema",
        "gradient_accumulation_steps",
        "all within LossScaleOptimizer",
        "Adafactor",
        "Nadam",
        *(name for name in SINCE_3_14 if hasattr(keras.optimizers, name)),
    ]
    results = check_ranks(
        SCRIPT.replace("OPTIMIZERS", repr(names)) + LORA + OVERFLOW,
        2,
        {"partitions": 2, "microbatches": 2},
    )
    for result in results:
        equal = [line.removeprefix("equal ") for line in result.lines if "equal" in line]
        by_fit = ["use_ema fit", "all within LossScaleOptimizer fit"]
        assert equal == [*(f"{name} loop" for name in names), *by_fit, "LoRA loop"]
