"""Trains, saves and loads a small model in this environment, and compares with plain Keras.

    python scripts/smoke.py FOLDER                        # one process with two devices
    python -m opensmp run -n 2 scripts/smoke.py FOLDER    # afterwards: two ranks, one device each

A training step by `smp.step`, `fit`, a checkpoint that is saved and restored, a `.keras` file that
plain Keras and opensmp load. The second run goes on from the checkpoint of the first one. It ends
with `smoke passed`, or with the first difference. FOLDER holds the files; it is made if it is not
there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import opensmp as smp

ROWS, STEPS, BOUND = 8, 3, 1e-5
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS * STEPS, 6)).astype("float32")
Y = RNG.integers(0, 3, ROWS * STEPS)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def main() -> int:
    """Runs all of it; returns 0."""
    if len(sys.argv) != 2:
        print("usage: smoke.py FOLDER", file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    smp.init({"partitions": 2, "microbatches": 2, "devices": "cpu"})
    by_step(folder)
    by_fit(folder)
    if smp.rank() == 0:
        print(f"smoke passed in {smp.size()} process(es)", flush=True)
    return 0


def network() -> keras.Model:
    """A network with state, whose first weights are always the same."""
    keras.utils.set_random_seed(7)
    inputs = keras.Input((6,), name="rows")
    x = keras.layers.Dense(16, activation="tanh")(inputs)
    x = keras.layers.LayerNormalization()(x)
    x = keras.layers.Dense(12, activation="gelu")(x)
    return keras.Model(inputs, keras.layers.Dense(3)(x))


def batches() -> list[tuple[Any, Any]]:
    """The data of a few steps."""
    return [
        (tf.constant(X[i : i + ROWS]), tf.constant(Y[i : i + ROWS])) for i in range(0, len(X), ROWS)
    ]


def by_step(folder: Path) -> None:
    """`smp.step`, and a checkpoint of it."""
    plain, split = network(), smp.DistributedModel.from_keras(network())
    one, other = (keras.optimizers.Adam(0.01, global_clipnorm=1.0) for _ in range(2))

    @tf.function
    def plain_step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = LOSS(y, plain(x, training=True))
        gradients = tape.gradient(loss, plain.trainable_variables)
        one.apply_gradients(zip(gradients, plain.trainable_variables, strict=True))
        return loss

    @smp.step
    def forward_backward(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = LOSS(y, split(x, training=True))
        return tape.gradient(loss, split.trainable_variables), loss

    @tf.function
    def split_step(x: Any, y: Any) -> Any:
        gradients, loss = forward_backward(x, y)
        found = [gradient.accumulate() for gradient in gradients]
        other.apply_gradients(zip(found, split.trainable_variables, strict=True))
        return loss.reduce_mean()

    def train() -> list[float]:
        losses = [(float(plain_step(*batch)), float(split_step(*batch))) for batch in batches()]
        same("losses of smp.step", *zip(*losses, strict=True))
        return [loss for _, loss in losses]

    checkpoint = tf.train.Checkpoint(model=split, optimizer=other)
    manager = smp.CheckpointManager(checkpoint, folder / "checkpoints", max_to_keep=2)
    if smp.size() > 1:  # what one process has saved
        beside = tf.train.Checkpoint(model=plain, optimizer=one)
        found = tf.train.latest_checkpoint(folder / "checkpoints")
        assert found, f"{folder}/checkpoints has no checkpoint: run it in one process first."
        assert manager.restore(), "nothing was restored"
        beside.restore(found)
    train()
    path = manager.save()
    after = train()
    assert manager.restore() == path, "another checkpoint was restored"
    again = [float(split_step(*batch)) for batch in batches()]
    assert again == after, f"after restoring the losses are {again}, they were {after}"
    if smp.size() > 1:
        return
    known = {name for name, _ in tf.train.list_variables(path)}
    assert len(known) > len(split.variables), f"the checkpoint has only {sorted(known)}"


def by_fit(folder: Path) -> None:
    """`compile`, `fit`, and a `.keras` file."""
    plain, split = network(), smp.DistributedModel.from_keras(network())
    histories = []
    for model in (plain, split):
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), LOSS, metrics=["accuracy"])
        fitted = model.fit(
            X, Y, batch_size=ROWS, epochs=2, shuffle=False, validation_split=1 / STEPS, verbose=0
        )
        histories.append(fitted.history)
    assert histories[0].keys() == histories[1].keys(), histories
    for key, values in histories[0].items():
        same(f"{key} of fit", values, histories[1][key])
    expected = plain.predict(X, batch_size=ROWS, verbose=0)
    same("predictions", expected, split.predict(X, batch_size=ROWS, verbose=0))
    file = folder / f"model-{smp.size()}.keras"
    split.save(file)  # returns in all ranks when it is written
    whole = keras.models.load_model(file)
    same("plain Keras' predictions", expected, whole.predict(X, batch_size=ROWS, verbose=0))
    assert int(whole.optimizer.iterations) == 4, "the optimizer's state was not saved"
    loaded = smp.load_model(file)
    same("predictions of what was loaded", expected, loaded.predict(X, batch_size=ROWS, verbose=0))


def same(what: str, plain: Any, split: Any) -> None:
    """Ends the program if numbers differ by more than the order of a sum explains."""
    np.testing.assert_allclose(split, plain, rtol=BOUND, atol=BOUND, err_msg=what)


if __name__ == "__main__":
    sys.exit(main())
