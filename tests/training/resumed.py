"""A program that trains, may be ended at any moment, and goes on when it is started again.

    python resumed.py FOLDER MODE CUT

MODE is `fit` (smp.CheckpointOnPreemption), `backup` (Keras' BackupAndRestore), `loop` (a custom
loop) or `plain` (nothing is saved, so that it is a run that was never ended). CUT is a moment at
which the program sends itself a signal, such as `TERM:train:3`: before the third batch of
training of this program, unless a launcher has started it again; `never`. Prints a checksum of all
that training leaves behind.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import opensmp as smp

EPOCHS = 3
PARTITIONS = int(os.environ.get("PARTITIONS", "2"))


class Cut(keras.callbacks.Callback):
    """Sends this process a signal at a moment."""

    def __init__(self, cut: str) -> None:
        super().__init__()
        self.name, self.where, number = cut.split(":")
        self.left = int(number)

    def count(self, where: str) -> None:
        if os.environ.get("OPENSMP_RUN_RESTART", "0") != "0":
            return
        if where == self.where and smp.rank() == int(os.environ.get("CUT_RANK", "0")):
            self.left -= 1
            if self.left == 0:
                for _ in range(int(os.environ.get("CUT_TIMES", "1"))):
                    os.kill(os.getpid(), signal.Signals[f"SIG{self.name}"])

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.count("train")

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.count("trained")

    def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.count("test")

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.count("epoch")

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.count("epoch_end")


def make_model() -> keras.Model:
    inputs = keras.Input((8, 8, 1))
    x = keras.layers.RandomFlip("horizontal")(inputs)
    x = keras.layers.Conv2D(4, 3)(x)
    x = keras.layers.BatchNormalization()(x)
    with smp.partition(int(PARTITIONS > 1)):
        x = keras.layers.Flatten()(x)
        x = keras.layers.Dropout(0.5)(x)
        x = Noise()(x)
        outputs = keras.layers.Dense(3)(x)
    return keras.Model(inputs, outputs)


class Noise(keras.layers.Layer):
    """Draws from Keras' global generator, whose state no layer has."""

    def call(self, x: Any, training: bool = False) -> Any:
        return x + 0.1 * keras.random.normal((1, 1)) if training else x


def data(kind: str) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(44, 8, 8, 1)).astype("float32")
    y = rng.integers(0, 3, 44)
    if kind == "arrays":
        return {"x": x, "y": y, "batch_size": 8}
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(44, seed=5).batch(8)
    if kind == "dataset":
        return {"x": dataset}
    if kind == "unknown":  # of a length that is not known beforehand
        return {"x": dataset.filter(lambda x, y: True)}
    assert kind == "endless", kind
    return {"x": dataset.repeat(), "steps_per_epoch": 4}


def checksum(values: Any) -> str:
    return hashlib.sha256(b"".join(np.asarray(v).tobytes() for v in values)).hexdigest()[:16]


def of_model(model: keras.Model) -> str:
    gathered = [*model.get_weights(), np.asarray(model.optimizer.iterations)]
    return checksum(gathered)


def train_by_fit(folder: str, mode: str, cut: str) -> str:
    model = smp.DistributedModel.from_keras(make_model())
    model.compile(
        keras.optimizers.Adam(0.02),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        steps_per_execution=int(os.environ.get("EXECUTION", "1")),
    )
    callbacks: list[Any] = []
    freq = os.environ.get("FREQ", "epoch")
    freq = int(freq) if freq.isdecimal() else None if freq == "none" else freq
    if mode == "fit":
        manager = smp.CheckpointManager(
            tf.train.Checkpoint(model=model, optimizer=model.optimizer),
            folder,
            max_to_keep=2,
            background=os.environ.get("BACKGROUND") == "1",
        )
        callbacks.append(smp.CheckpointOnPreemption(manager, save_freq=freq))
    callbacks += [
        keras.callbacks.ReduceLROnPlateau("loss", patience=1, min_delta=10.0),
        keras.callbacks.EarlyStopping("loss", patience=50, restore_best_weights=True),
    ]
    if mode == "backup":
        callbacks.append(keras.callbacks.BackupAndRestore(f"{folder}/b", freq, False, False))
    if cut != "never":
        callbacks.append(Cut(cut))
    given = data(os.environ.get("DATA", "arrays"))
    x, y = np.ones((10, 8, 8, 1), "float32"), np.zeros(10)
    history = model.fit(
        **given, epochs=EPOCHS, validation_data=(x, y), callbacks=callbacks, verbose=0
    ).history
    last = {name: values[-1] for name, values in history.items()}
    return f"{of_model(model)} {sorted(last.items())}"


def train_by_loop(folder: str, cut: str) -> str:
    model = smp.DistributedModel.from_keras(make_model())
    optimizer = keras.optimizers.Adam(0.02)
    optimizer.build(model.trainable_variables)
    given = data("dataset")["x"]
    batches = iter(smp.shard(given.repeat()) if smp.dp_size() > 1 else given.repeat())
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer, batches=batches)
    manager = smp.CheckpointManager(
        checkpoint, folder, max_to_keep=2, background=os.environ.get("BACKGROUND") == "1"
    )
    callback = Cut(cut) if cut != "never" else None

    @smp.step
    def forward_backward(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = loss_of(y, model(x, training=True))
        return tape.gradient(loss, model.trainable_variables), loss

    @tf.function
    def train_step(x: Any, y: Any) -> Any:
        gradients, loss = forward_backward(x, y)
        gradients = [smp.allreduce(each.accumulate()) for each in gradients]
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss.reduce_mean()

    manager.restore()
    while int(optimizer.iterations) < 14:
        if callback is not None:
            callback.count("train")
        train_step(*next(batches))
        if callback is not None:
            callback.count("trained")
        smp.checkpoint_on_preemption(manager, seconds=float(os.environ.get("SECONDS", "300")))
        if int(optimizer.iterations) % 5 == 0:
            manager.save()
    return of_model_and(model, optimizer)


def of_model_and(model: keras.Model, optimizer: Any) -> str:
    return checksum([*model.get_weights(), np.asarray(optimizer.iterations)])


def main() -> None:
    folder, mode, cut = sys.argv[1:]
    os.makedirs(folder, exist_ok=True)
    smp.init({"partitions": PARTITIONS, "microbatches": 2})
    keras.utils.set_random_seed(7)
    open(os.path.join(folder, f"began-{os.getpid()}"), "w").close()
    result = train_by_loop(folder, cut) if mode == "loop" else train_by_fit(folder, mode, cut)
    if smp.rank() == 0:
        print(f"RESULT {result}", flush=True)


if __name__ == "__main__":
    main()
