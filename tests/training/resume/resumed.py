"""A program that trains, may be ended at any moment, and goes on when it is started again.

    python resumed.py FOLDER MODE CUT

MODE is `fit` (smp.CheckpointOnPreemption), `backup` (Keras' BackupAndRestore), `loop` (a custom
loop) or `plain` (nothing is saved, so that it is a run that was never ended). CUT says at which
moments the program sends itself a signal, such as `TERM:train:3`: before the third batch of
training of this program; `never`. After a comma comes the moment of a program that a launcher has
started again. What follows: `@1` or `@01`, the ranks, 0 by default; `*2`, how often. Prints a
checksum of all that training leaves behind, and writes the weights to FOLDER/weights.npz.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
import time
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import opensmp as smp
from opensmp.saving.checkpoint import writer

EPOCHS = 3
STEPS = int(os.environ.get("STEPS", "14"))
PARTITIONS = int(os.environ.get("PARTITIONS", "2"))


class Cut(keras.callbacks.Callback):
    """Sends this process a signal at a moment."""

    def __init__(self, cuts: str) -> None:
        super().__init__()
        moments = dict(enumerate(cuts.split(",")))
        cut = moments.get(int(os.environ.get("OPENSMP_RUN_RESTART", "0")), "never")
        self.left, self.has_begun = 0, False
        if cut != "never":
            cut, _, times = cut.partition("*")
            cut, _, ranks = cut.partition("@")
            self.name, self.where, number = cut.split(":")
            self.times, self.is_mine = int(times or 1), str(smp.rank()) in (ranks or "0")
            self.left = int(number)

    def count(self, where: str) -> None:
        if self.left and where == self.where and self.is_mine:
            self.left -= 1
            if self.left == 0 and where == "during":
                threading.Timer(0.02, self.send).start()
            elif self.left == 0:
                self.send()

    def send(self) -> None:
        with open(os.path.join(sys.argv[1], "sent.txt"), "a") as file:
            print(self.name, self.where, "by rank", smp.rank(), file=file)
        for _ in range(self.times):
            os.kill(os.getpid(), signal.Signals[f"SIG{self.name}"])

    def step(self) -> None:
        """Counts a step that begins; `during` is some moment of the step."""
        self.has_begun = True
        self.count("during")
        self.count("train")
        time.sleep(float(os.environ.get("SLOW", "0")))

    def watch_saves(self) -> None:
        """Counts saves: the signal comes when a rank writes its part."""
        own_part = writer.own_part

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count("save")
            return own_part(*args, **kwargs)

        writer.own_part = counted

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.step()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.count("trained")

    def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.count("test")

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.count("epoch")

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.count("epoch_end")


cut = Cut("never")


def make_model() -> keras.Model:
    inputs = keras.Input((8, 8, 1))
    if os.environ.get("MODEL") == "dense":  # nothing in it depends on how batches are split
        x = keras.layers.Flatten()(inputs)
        for number in range(4):
            with smp.partition(number * PARTITIONS // 4):
                x = keras.layers.Dense(3 if number == 3 else 16, None if number == 3 else "tanh")(x)
        return keras.Model(inputs, x)
    x = keras.layers.RandomFlip("horizontal")(inputs)
    x = keras.layers.Conv2D(4, 3)(x)
    x = keras.layers.BatchNormalization()(x)
    with smp.partition(int(PARTITIONS > 1)):
        x = keras.layers.Flatten()(x)
        x = keras.layers.Dropout(0.5)(x)
        x = Noise()(x)
        outputs = keras.layers.Dense(3)(x)
    return keras.Model(inputs, outputs)


generator: Any = None  # Keras' own, which fit saves


class Noise(keras.layers.Layer):
    """Draws from a generator whose state no layer has."""

    def call(self, x: Any, training: bool = False) -> Any:
        if cut.has_begun and not tf.executing_eagerly():
            cut.count("trace")
        return x + 0.1 * keras.random.normal((1, 1), seed=generator) if training else x


def data(kind: str) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(44, 8, 8, 1)).astype("float32")
    y = rng.integers(0, 3, 44)
    if kind == "arrays":
        return {"x": x, "y": y, "batch_size": 8}
    # An iterator that is restored twice in one pass reshuffles differently: see the docs.
    again = kind != "fixed"
    dataset = tf.data.Dataset.from_tensor_slices((x, y))
    dataset = dataset.shuffle(44, seed=5, reshuffle_each_iteration=again).batch(8)
    if kind in ("dataset", "fixed"):
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


def train_by_fit(folder: str, mode: str) -> str:
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
    callbacks.append(cut)
    given = data(os.environ.get("DATA", "arrays"))
    x, y = np.ones((10, 8, 8, 1), "float32"), np.zeros(10)
    history = model.fit(
        **given, epochs=EPOCHS, validation_data=(x, y), callbacks=callbacks, verbose=0
    ).history
    last = {name: values[-1] for name, values in history.items()}
    keep(folder, model)
    return f"{of_model(model)} {sorted(last.items())}"


def train_by_loop(folder: str) -> str:
    global generator
    generator = keras.random.SeedGenerator(3)
    model = smp.DistributedModel.from_keras(make_model())
    optimizer = keras.optimizers.Adam(0.02)
    optimizer.build(model.trainable_variables)
    given = data("fixed")["x"]
    batches = iter(smp.shard(given.repeat()) if smp.dp_size() > 1 else given.repeat())
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    checkpoint = tf.train.Checkpoint(
        model=model, optimizer=optimizer, batches=batches, noise=generator.state
    )
    manager = smp.CheckpointManager(
        checkpoint, folder, max_to_keep=2, background=os.environ.get("BACKGROUND") == "1"
    )

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
    while int(optimizer.iterations) < STEPS:
        cut.step()
        train_step(*next(batches))
        cut.count("trained")
        smp.checkpoint_on_preemption(manager, seconds=float(os.environ.get("SECONDS", "300")))
        if int(optimizer.iterations) % 5 == 0:
            manager.save()
    keep(folder, model)
    return checksum([*model.get_weights(), np.asarray(optimizer.iterations)])


def keep(folder: str, model: keras.Model) -> None:
    weights = model.get_weights()
    if smp.rank() == 0:
        np.savez(os.path.join(folder, "weights.npz"), *weights)


def main() -> None:
    global cut
    folder, mode, cuts = sys.argv[1:]
    os.makedirs(folder, exist_ok=True)
    smp.init({"partitions": PARTITIONS, "microbatches": 2})
    keras.utils.set_random_seed(7)
    cut = Cut(cuts)
    cut.watch_saves()
    result = train_by_loop(folder) if mode == "loop" else train_by_fit(folder, mode)
    if smp.rank() == 0:
        print(f"RESULT {result}", flush=True)


if __name__ == "__main__":
    main()
