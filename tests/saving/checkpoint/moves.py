"""A training run of everything that a checkpoint may hold, moved between set-ups.

    opensmp run -n 2 moves.py FOLDER two
    opensmp run -n 4 moves.py FOLDER hybrid
    opensmp run -n 2 moves.py FOLDER v

The ranks take over a run that one process has saved in FOLDER/one, and leave what they have of
their own checkpoints and losses in FOLDER.
"""

from __future__ import annotations

import pathlib
import pickle
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import opensmp as smp
from opensmp import _private
from opensmp.saving.checkpoint import writer
from opensmp.saving.checkpoint.background import staging

BATCH = 8

Values = Mapping[str, np.ndarray]


class Run:
    """A model with dropout and moving statistics, Adam, a metric, a seed, data of this replica."""

    def __init__(self, seed: int, directory: Any, **kwargs: Any) -> None:
        keras.utils.set_random_seed(seed)
        x = inputs = keras.Input((6,))
        for units in (8, 10, 6):
            x = keras.layers.Dense(units, activation="tanh")(x)
        x = keras.layers.BatchNormalization()(x)
        x = keras.layers.Dropout(0.25, seed=seed)(x)
        model = keras.Model(inputs, keras.layers.Dense(2)(x), name="net")
        self.model = smp.DistributedModel.from_keras(model)
        self.optimizer = keras.optimizers.Adam(0.01)
        self.metric = keras.metrics.Mean()
        self.generator = keras.random.SeedGenerator(seed)
        share = BATCH // smp.dp_size()
        data = tf.data.Dataset.range(1000).batch(share)
        self.iterator = iter(data.shard(smp.dp_size(), smp.dp_rank()))
        self.checkpoint = tf.train.Checkpoint(
            model=self.model,
            optimizer=self.optimizer,
            metric=self.metric.variables,
            generator=self.generator.state,
            data=self.iterator,
        )
        self.manager = smp.CheckpointManager(self.checkpoint, directory, **kwargs)

        @smp.step
        def forward_backward(x: Any) -> Any:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(self.model(x, training=True) ** 2)
            return tape.gradient(loss, self.model.trainable_variables), loss

        self._step = forward_backward

    def build(self) -> None:
        """Makes all variables, as the first step would."""
        self.model(tf.zeros([BATCH, 6]))
        self.optimizer.build(self.model.trainable_variables)

    def train(self) -> float:
        """One step on the next batch; its loss."""
        rows = tf.cast(next(self.iterator), tf.float32)
        x = tf.sin(rows[:, tf.newaxis] * tf.range(1.0, 7.0))
        x += 0.1 * keras.random.normal((BATCH, 6), seed=self.generator)[: len(rows)]
        gradients, loss = self._step(x)
        gradients = [smp.allreduce(g.accumulate()) for g in gradients]
        self.optimizer.apply_gradients(zip(gradients, self.model.trainable_variables, strict=True))
        mean = smp.allreduce(loss.reduce_mean())
        self.metric.update_state(mean)
        return float(mean)

    def values(self) -> Values:
        """All values that lie in this process and that all replicas have alike."""
        named = [
            *(
                (f"model {i}", v)
                for i, v in enumerate(self.model.variables)
                if smp.dp_rank() == 0 or not v.name.startswith("moving")
            ),
            *((f"optimizer {i}", v) for i, v in enumerate(self.optimizer.variables)),
            *((f"metric {i}", v) for i, v in enumerate(self.metric.variables)),
            ("generator", self.generator.state),
        ]
        return {name: v.numpy() for name, v in named if not _private.is_elsewhere(v)}


def same(left: Values, right: Values) -> None:
    """Asserts equal bits of what both have."""
    both = left.keys() & right.keys()
    assert both, (list(left), list(right))
    for name in both:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


# ------------------------------------------------------------------------------ in the ranks


def main(folder: pathlib.Path, how: str) -> None:
    pipeline = "zb_v" if how == "v" else "interleaved"
    smp.init({"partitions": 2, "microbatches": 2, "pipeline": pipeline})
    run = Run(2, folder / "one")
    run.manager.restore()
    run.build()
    record: dict[str, Any] = {"restored": run.values()}
    record["losses of one"] = [run.train() for _ in range(2)] if smp.size() == 2 else []
    run = Run(3, folder / how)
    run.train()
    run.train()
    path = run.manager.save()
    record["saved"] = run.values()
    record["losses"] = [run.train(), run.train()]
    for when in ("before the first step", "later"):
        other = Run(4, folder / how)
        if when == "later":
            other.train()
        assert other.manager.restore() == path
        other.build()
        same(other.values(), record["saved"])
        np.testing.assert_allclose([other.train(), other.train()], record["losses"], rtol=1e-6)
    in_background(run, other, folder / "background")
    if how == "two":
        one_rank_fails(other)
        a_part_is_damaged(other, folder / "two")
    (folder / f"{how}-{smp.rank()}.pickle").write_bytes(pickle.dumps(record))
    print("done", flush=True)


def in_background(run: Run, other: Run, folder: pathlib.Path) -> None:
    staging._WORTH_BYTES = 1  # even small values are copied and written as large ones are
    manager = smp.CheckpointManager(run.checkpoint, folder, background=True)
    path, values = manager.save(), run.values()
    run.train()
    manager.wait()
    assert manager.latest_checkpoint == path
    second = manager.save()  # this one is waited for by the next call
    assert smp.CheckpointManager(other.checkpoint, folder).restore(path) == path
    same(other.values(), values)
    assert manager.restore() == second


def refusal(call: Any) -> str:
    try:
        call()
    except smp.CheckpointError as error:
        return str(error)
    raise AssertionError("no error")


def one_rank_fails(run: Run) -> None:
    """Rank 1 has no room; both are told."""
    original = writer.write_part

    def fails(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    background = smp.CheckpointManager(run.checkpoint, run.manager.directory, background=True)
    for manager in (run.manager, background):
        before = manager.checkpoints
        writer.write_part = fails if smp.rank() == 1 else original
        text = refusal(lambda manager=manager: (manager.save(), manager.wait()))
        assert "rank 1: OSError: [Errno 28] No space left on device" in text, text
        assert "earlier ones are as they were" in text, text
        assert manager.checkpoints == before
        writer.write_part = original
        manager.save()
        manager.wait()
        assert len(manager.checkpoints) == len(before) + 1
    extra = {"extra": tf.Variable(1.0)} if smp.rank() == 1 else {}
    checkpoint = tf.train.Checkpoint(model=run.model, **extra)
    manager = smp.CheckpointManager(checkpoint, run.manager.directory)
    assert "only in rank 1: extra" in refusal(manager.save)
    assert "not in the checkpoint" in refusal(manager.restore)


def a_part_is_damaged(run: Run, folder: pathlib.Path) -> None:
    """What rank 1 reads is damaged; both take the checkpoint before."""
    *_, good, newest = run.manager.checkpoints
    smp.barrier()
    if smp.rank() == 0:
        file = max(folder.glob(f"{pathlib.Path(newest).name}.data-*"))
        data = bytearray(file.read_bytes())
        data[3] ^= 1
        file.write_bytes(data)
    smp.barrier()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert run.manager.restore() == good
    assert any("is damaged and is left out" in str(w.message) for w in caught)
    assert f"The newest good one here is {good}" in refusal(lambda: run.manager.restore(newest))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2])
