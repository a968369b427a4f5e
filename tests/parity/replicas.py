"""Run by every rank of several processes: models trained by replicas, each on its share of a batch.

    opensmp run -n 4 replicas.py FOLDER 2 simple "MLP, SGD" "embedding, SGD"

trains each model with two partitions by the schedule named, and leaves what this rank has of
losses, first gradients and variables in FOLDER. After `early simple` gradients leave as they would
if the replicas were on several machines, and for several microbatches at once. `plain` makes the
same with plain Keras on the whole batch.
"""

from __future__ import annotations

import dataclasses
import pathlib
import pickle
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

BATCH = 16
MICROBATCHES = 2
NUM_STEPS = 3
SEED = 33

Record = dict[str, Any]


class Trained(NamedTuple):
    """What is trained.

    Attributes:
        build: Makes the model, of dtype float64.
        batch: Makes inputs and labels from a random generator.
        optimizer: Makes the optimizer.
    """

    build: Callable[[], keras.Model]
    batch: Callable[[np.random.Generator], tuple[Any, Any]]
    optimizer: Callable[[], keras.optimizers.Optimizer]


def mlp() -> keras.Model:
    x = inputs = keras.Input((12,))
    for units in (24, 16, 20):
        x = keras.layers.Dense(units, activation="tanh")(x)
    return keras.Model(inputs, keras.layers.Dense(5)(x))


def residual_cnn() -> keras.Model:
    images = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(8, 3, padding="same", activation="relu")(images)
    y = keras.layers.Conv2D(8, 3, padding="same", activation="relu")(x)
    y = keras.layers.Conv2D(8, 3, padding="same")(y)
    x = keras.layers.ReLU()(keras.layers.Add()([x, y]))
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(images, keras.layers.Dense(5)(x))


def tied_embedding() -> keras.Model:
    embedding = keras.layers.Embedding(11, 8)
    tokens = keras.Input((6,), dtype="int32")
    x = embedding(tokens)
    x = keras.layers.Add()([x, keras.layers.MultiHeadAttention(2, 4)(x, x)])
    x = keras.layers.LayerNormalization()(x)
    x = keras.layers.Dense(8, activation="gelu")(x)
    x = keras.layers.Lambda(lambda x: keras.ops.mean(x, axis=1))(x)
    return keras.Model(tokens, keras.layers.Dense(5)(x))


def frozen_below() -> keras.Model:
    model = mlp()
    model.layers[1].trainable = False
    return model


def _labels(random: np.random.Generator) -> Any:
    return random.integers(0, 5, BATCH)


def _rows(random: np.random.Generator) -> tuple[Any, Any]:
    return random.normal(size=(BATCH, 12)), _labels(random)


def _images(random: np.random.Generator) -> tuple[Any, Any]:
    return random.normal(size=(BATCH, 8, 8, 3)), _labels(random)


def _tokens(random: np.random.Generator) -> tuple[Any, Any]:
    return random.integers(0, 11, (BATCH, 6)).astype("int32"), _labels(random)


MODELS: Mapping[str, Trained] = {
    "MLP, SGD": Trained(mlp, _rows, lambda: keras.optimizers.SGD(0.1, momentum=0.9)),
    "MLP, Adam": Trained(mlp, _rows, lambda: keras.optimizers.Adam(1e-2)),
    "residual CNN, SGD": Trained(residual_cnn, _images, lambda: keras.optimizers.SGD(0.1)),
    "embedding, SGD": Trained(tied_embedding, _tokens, lambda: keras.optimizers.SGD(0.1)),
    "frozen layer, SGD": Trained(frozen_below, _rows, lambda: keras.optimizers.SGD(0.1)),
}


def _made(name: str) -> tuple[keras.Model, keras.optimizers.Optimizer, list[tuple[Any, Any]]]:
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(SEED)
    policy = keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    try:
        trained = MODELS[name]
        random = np.random.default_rng(SEED)
        return (
            trained.build(),
            trained.optimizer(),
            [trained.batch(random) for _ in range(NUM_STEPS)],
        )
    finally:
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy(policy)


def loss_function() -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype="float64")


def plain(name: str) -> Record:
    """Plain Keras on the whole batch."""
    model, optimizer, batches = _made(name)
    loss_fn = loss_function()
    record: Record = {}
    for step, (inputs, labels) in enumerate(batches):
        with tf.GradientTape() as tape:
            loss = loss_fn(labels, model(inputs, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        if step == 0:
            _note_gradients(record, model, gradients)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        record[f"loss {step}"] = loss.numpy()
    for index, variable in enumerate(model.variables):
        record[f"variable {index} {variable.path}"] = variable.numpy()
    return record


def split(name: str) -> Record:
    """What this rank has of the same, with its share of each batch."""
    import opensmp as smp
    from opensmp import _private

    plain_model, optimizer, batches = _made(name)
    model = smp.DistributedModel.from_keras(plain_model)
    loss_fn = loss_function()

    @smp.step
    def forward_backward(inputs: Any, labels: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = loss_fn(labels, model(inputs, training=True))
        return tape.gradient(loss, model.trainable_variables), loss

    @tf.function
    def train_step(inputs: Any, labels: Any) -> Any:
        gradients, loss = forward_backward(inputs, labels)
        gradients = [smp.allreduce(g.accumulate()) for g in gradients]
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return gradients, smp.allreduce(loss.reduce_mean())

    record: Record = {}
    share = BATCH // smp.dp_size()
    own = slice(smp.dp_rank() * share, (smp.dp_rank() + 1) * share)
    for step, (inputs, labels) in enumerate(batches):
        gradients, loss = train_step(inputs[own], labels[own])
        if step == 0:
            _note_gradients(record, model, gradients)
        record[f"loss {step}"] = loss.numpy()
    for index, variable in enumerate(model.variables):
        if not _private.is_elsewhere(variable):
            record[f"variable {index} {variable.path}"] = variable.numpy()
    return record


def _note_gradients(record: Record, model: keras.Model, gradients: Any) -> None:
    from opensmp import _private

    for index, (variable, gradient) in enumerate(
        zip(model.trainable_variables, gradients, strict=True)
    ):
        if not _private.is_elsewhere(variable):
            record[f"gradient {index}"] = tf.convert_to_tensor(gradient).numpy()


def main(folder: pathlib.Path, partitions: int, schedules: list[str], names: list[str]) -> None:
    import opensmp as smp
    from opensmp.api import init
    from opensmp.distributed import world

    for schedule in schedules:
        init.shutdown()
        pipeline = schedule.removeprefix("early ")
        config = {"partitions": partitions, "microbatches": MICROBATCHES, "pipeline": pipeline}
        early = pipeline != schedule
        if early:  # and for two microbatches at once
            config |= {"microbatches": 2 * MICROBATCHES, "optimize": "speed"}
        smp.init(config)
        world.set_current(dataclasses.replace(world.current(), sums_early=early))
        for name in names:
            path = folder / f"{schedule}-{name}-{smp.rank()}.pickle"
            path.write_bytes(pickle.dumps(split(name)))
            print(f"{schedule} {name} done", flush=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(","), sys.argv[4:])
