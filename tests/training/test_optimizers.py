"""Every optimizer of Keras trains a split model as it trains a plain one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from training.fixtures import assert_close
from turns import in_turn

import opensmp as smp

ROWS, STEPS = 8, 5
WAYS = ["fit", "loop"]

ARGUMENTS: dict[str, Callable[[type], Any]] = {
    "LossScaleOptimizer": lambda kind: kind(
        keras.optimizers.SGD(0.1, momentum=0.9), initial_scale=2.0**14, dynamic_growth_steps=2
    ),
    "MultiOptimizer": lambda kind: kind(
        keras.optimizers.OptimizerMap(
            keras.optimizers.SGD(0.1, momentum=0.5),
            {".*kernel": keras.optimizers.Adam(0.01), ".*embeddings": keras.optimizers.Lion(0.01)},
        )
    ),
}
"""How to make optimizers that want more than a learning rate."""

CLASSES = {
    name: kind
    for name, kind in vars(keras.optimizers).items()
    if inspect.isclass(kind)
    and issubclass(kind, keras.optimizers.Optimizer)
    and kind is not keras.optimizers.Optimizer
}

OPTIONS: dict[str, Callable[[], Any]] = {
    "clipnorm": lambda: keras.optimizers.Adam(0.01, clipnorm=0.02),
    "clipvalue": lambda: keras.optimizers.SGD(0.1, momentum=0.9, clipvalue=0.01),
    "global_clipnorm": lambda: keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=0.05),
    "weight_decay": lambda: keras.optimizers.SGD(0.1, weight_decay=0.1),
    "use_ema": lambda: keras.optimizers.Adam(
        0.01, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2
    ),
    "gradient_accumulation_steps": lambda: keras.optimizers.Adam(
        0.01, gradient_accumulation_steps=2, global_clipnorm=0.05, use_ema=True
    ),
    "loss_scale_factor": lambda: keras.optimizers.SGD(0.1, loss_scale_factor=8.0),
    "all within LossScaleOptimizer": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.AdamW(0.01, weight_decay=0.1, global_clipnorm=0.05, use_ema=True),
        dynamic_growth_steps=2,
    ),
    "schedule": lambda: keras.optimizers.Adam(
        keras.optimizers.schedules.CosineDecay(
            0.0, decay_steps=4, warmup_target=0.05, warmup_steps=2
        )
    ),
}


def made(name: str) -> Any:
    """An optimizer of one of Keras' classes."""
    return ARGUMENTS.get(name, lambda kind: kind(0.01))(CLASSES[name])


DENSE_ONLY = {"loss_scale_factor"}  # Keras cannot divide sparse gradients by it
BUILT_FIRST = {"ScheduleFreeAdamW"}  # Keras forgets the first weights if `fit` builds it


def model(sparse: bool = True) -> keras.Model:
    """An embedding, which has sparse gradients, and dense layers with a constraint."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((3,), dtype="int32")
    if sparse:
        x = keras.layers.Embedding(7, 5, name="table")(inputs)
        x = keras.layers.Flatten()(x)
    else:
        x = keras.layers.Rescaling(0.1)(inputs)
        x = keras.layers.Dense(5, name="table")(x)
    x = keras.layers.Dense(6, activation="tanh", name="one")(x)
    x = keras.layers.Dense(5, activation="tanh", kernel_constraint="max_norm", name="two")(x)
    return keras.Model(inputs, keras.layers.Dense(4, name="top")(x))


def batches() -> tuple[Any, Any]:
    """Tokens and labels of all steps."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 7, (ROWS * STEPS, 3)), rng.integers(0, 4, ROWS * STEPS)


def train(model: keras.Model, optimizer: Any, way: str) -> None:
    """Five steps: by `fit`, or in a loop of one's own."""
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    x, y = batches()
    if way == "fit":
        model.compile(optimizer, loss_fn)
        model.fit(x, y, batch_size=ROWS, shuffle=False, verbose=0)
        return

    def gradients(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = optimizer.scale_loss(loss_fn(y, model(x, training=True)))
        return tape.gradient(loss, model.trainable_variables)

    step = smp.step(gradients) if isinstance(model, smp.DistributedModel) else None

    @tf.function
    def train_step(x: Any, y: Any) -> None:
        found = gradients(x, y) if step is None else [g.accumulate() for g in step(x, y)]
        optimizer.apply_gradients(zip(found, model.trainable_variables, strict=True))

    x, y = tf.constant(x), tf.constant(y)
    for i in range(0, ROWS * STEPS, ROWS):
        train_step(x[i : i + ROWS], y[i : i + ROWS])
    optimizer.finalize_variable_values(model.trainable_variables)


def assert_same_training(make: Callable[[], Any], way: str, name: str) -> None:
    """Trains a plain and a split model; compares weights and all state of the optimizers."""
    sparse = name not in DENSE_ONLY
    plain, split = model(sparse), smp.DistributedModel.from_keras(model(sparse))
    one, other = make(), make()
    if name in BUILT_FIRST:
        one.build(plain.trainable_variables)
        other.build(split.trainable_variables)
    train(plain, one, way)
    train(split, other, way)
    assert_close(plain.get_weights(), split.get_weights())
    values = [[np.asarray(v) for v in optimizer.variables] for optimizer in (one, other)]
    assert_close(*values)
    assert_slots_beside_variables(split, other)


def assert_slots_beside_variables(split: keras.Model, optimizer: Any) -> None:
    """Each slot has the name of its variable in its own, and must have its device."""
    homes = {v.path.replace("/", "_"): v.value.device for v in split.trainable_variables}
    assert len(set(homes.values())) > 1
    slots = 0
    for slot in optimizer.variables:
        of = [name for name in homes if name in slot.path]
        if of:
            slots += 1
            assert slot.value.device == homes[max(of, key=len)], slot.path
    assert slots or isinstance(optimizer, keras.optimizers.SGD)


@pytest.mark.parametrize("name", in_turn(CLASSES, 3))
def test_class(smp_init, name):
    """Half of them by `fit`, the others in a loop; on 2 and on 4 partitions."""
    number = list(CLASSES).index(name)
    smp_init({"partitions": 2 + 2 * (number // 2 % 2), "microbatches": 4})
    assert_same_training(lambda: made(name), WAYS[number % 2], name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CLASSES, *OPTIONS])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("partitions", [2, 4])
def test_every_way(smp_init, partitions, way, name):
    smp_init({"partitions": partitions, "microbatches": 4})
    assert_same_training(OPTIONS.get(name, lambda: made(name)), way, name)


@pytest.mark.parametrize("name", in_turn(OPTIONS, 2))
def test_option(smp_init, name):
    number = list(OPTIONS).index(name)
    smp_init({"partitions": 4 - 2 * (number // 2 % 2), "microbatches": 4})
    assert_same_training(OPTIONS[name], WAYS[number % 2], name)
