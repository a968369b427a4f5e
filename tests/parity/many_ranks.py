"""Run by each of twelve ranks: a model trained, saved, restored and read, in two layouts.

    opensmp run -n 12 many_ranks.py FOLDER

First all ranks are one pipeline of twelve partitions, then six replicas of two. Each rank leaves in
FOLDER what it has got. From eleven ranks on TensorFlow counts processes in another order than that
of their ranks.
"""

from __future__ import annotations

import pathlib
import pickle
import sys
from typing import Any

import keras
import numpy as np
import tensorflow as tf

LAYOUTS = {12: 1, 2: 6}
"""Number of partitions to number of replicas."""

BATCH = 24
WORDS, LENGTH = 40, 3

Record = dict[str, Any]


def build() -> keras.Model:
    """A model of float64 with enough layers for twelve partitions, and a sparse gradient."""
    keras.utils.set_random_seed(5)
    keras.config.set_floatx("float64")
    words = keras.Input((LENGTH,), dtype="int32")
    x = keras.layers.Embedding(WORDS, 4)(words)
    x = keras.layers.Flatten()(x)
    for number in range(12):
        x = keras.layers.Dense(6 + number % 3, activation="tanh")(x)
    return keras.Model(words, keras.layers.Dense(2)(x))


def data() -> tuple[Any, Any]:
    """Two batches of words and labels."""
    numbers = np.random.default_rng(3)
    return numbers.integers(0, WORDS, [2 * BATCH, LENGTH]), numbers.normal(size=[2 * BATCH, 2])


def optimizer() -> keras.optimizers.Optimizer:
    """One with slots."""
    return keras.optimizers.SGD(0.05, momentum=0.9)


def fit(model: keras.Model) -> float:
    """Trains an epoch; its loss."""
    return model.fit(*data(), batch_size=BATCH, shuffle=False, verbose=0).history["loss"][0]


def gathered(smp: Any) -> Record:
    """What gathers of all kinds give this rank."""
    rank = smp.rank()
    slices = tf.IndexedSlices(
        tf.fill([2, 3], float(rank)), tf.fill([2], rank), tf.constant([12, 3])
    )
    found = {group.name: smp.allgather((rank, "x" * 1000 * rank), group) for group in smp.CommGroup}
    summed = tf.function(lambda s: smp.allreduce(s, "sum", smp.DP_GROUP))(slices)
    return {
        **{name: [number for number, _ in each] for name, each in found.items()},
        "rows": summed.indices.numpy().tolist(),
    }


def run(folder: pathlib.Path, partitions: int) -> Record:
    import opensmp as smp

    smp.init({"partitions": partitions, "microbatches": 2})
    model = smp.DistributedModel.from_keras(build())
    model.compile(optimizer(), "mse")
    record: Record = {"gathered": gathered(smp), "groups": [smp.get_mp_group(), smp.get_dp_group()]}
    record["loss"] = fit(model)
    record["trained"] = model.get_weights()
    model.save(folder / f"{partitions}.keras")
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    manager = smp.CheckpointManager(checkpoint, folder / f"checkpoints-{partitions}")
    path = manager.save()
    record["next loss"] = fit(model)
    record["further"] = model.get_weights()
    assert manager.restore() == path
    record["restored"] = model.get_weights()
    record["loss again"] = fit(model)
    smp.shutdown()
    return record


def main(folder: pathlib.Path) -> None:
    """Leaves what this rank has got of all layouts."""
    records = {partitions: run(folder, partitions) for partitions in LAYOUTS}
    import opensmp as smp

    smp.init({"partitions": 2})
    (folder / f"{smp.rank()}.pickle").write_bytes(pickle.dumps(records))
    smp.barrier()


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
