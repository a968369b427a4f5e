"""Run by every rank: what programs do with `shard_optimizer_state` beyond a training step.

opensmp run -n 2 sharded_usage.py FOLDER again callbacks
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from parity.shards import (
    BATCH,
    batches,
    digests,
    loss_function,
    network,
    prepared,
    share,
    slot_bytes,
    state,
    step_of,
)


def rows(number: int = 4) -> list[Any]:
    return [np.concatenate(part) for part in zip(*batches(number), strict=True)]


def adam(**kwargs: Any) -> Any:
    return keras.optimizers.Adam(1e-2, **kwargs)


def expect_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for key, value in found.items():
        np.testing.assert_array_equal(value, expected[key], err_msg=key)


def again(folder: Path) -> None:
    """Another smp.init goes on with the same model and optimizer: divided, whole, divided."""
    import opensmp as smp

    results = {}
    for kinds in ((False, False, False), (True, False, True), (False, True, True)):
        model, optimizer = prepared(1, kinds[0]), adam()
        sizes = []
        for number, sharded in enumerate(kinds):
            if number:
                smp.shutdown()
                smp.init({"microbatches": 2, "shard_optimizer_state": sharded})
            train_step = step_of(model, optimizer)
            for batch in batches():
                train_step(*share(batch))
            sizes.append(slot_bytes(optimizer))
        whole = max(sizes[i] for i in range(3) if not kinds[i]) if not all(kinds) else 0
        for size, sharded in zip(sizes, kinds, strict=True):
            assert size <= 0.7 * whole if sharded else size == whole, (kinds, sizes)
        results[kinds] = state(model, optimizer)
    whole = results[(False, False, False)]
    for found in results.values():
        expect_same(found, whole)


def partitions(folder: Path) -> None:
    """Two replicas go on as one replica of two partitions, and back."""
    import opensmp as smp

    results = []
    for sharded in (False, True):
        model, optimizer = prepared(1, sharded), adam()
        for parts in (1, 2, 1):
            smp.shutdown()
            keys = {"microbatches": 2, "partitions": parts, "shard_optimizer_state": sharded}
            smp.init(keys)
            train_step = step_of(model, optimizer)
            for batch in batches(3):
                train_step(*share(batch))
        results.append(state(model, optimizer))
    expect_same(results[1], results[0])


class Custom(keras.Model):
    """A train_step with two optimizers, one for each half of the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()
        self.second = keras.optimizers.SGD(0.1, momentum=0.9)

    def call(self, x: Any, training: Any = None) -> Any:
        return self.inner(x, training=training)

    def train_step(self, data: Any) -> Any:
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        variables = self.trainable_variables
        gradients = tape.gradient(loss, variables)
        pairs = list(zip(gradients, variables, strict=True))
        self.optimizer.apply_gradients(pairs[::2])
        self.second.apply_gradients(pairs[1::2])
        return {"loss": loss}


def custom(folder: Path) -> None:
    """A custom train_step with two optimizers."""
    import opensmp as smp

    results = []
    for sharded in (False, True):
        prepared(1, sharded)
        keras.utils.set_random_seed(5)
        model = smp.DistributedModel.from_keras(Custom())
        model.compile(adam(), loss_function())
        model.fit(*rows(), batch_size=BATCH, epochs=2, shuffle=False, verbose=0)
        model.save(folder / f"custom-{sharded}.keras")
        values = state(model, model.optimizer)
        values |= {f"second {k}": v for k, v in state(model, model.second).items()}
        results.append(values)
    expect_same(results[1], results[0])
    assert len(results[1]) < len(results[0])


def callbacks(folder: Path) -> None:
    """Averages swapped in for validation, files written in rank 0, and resuming."""
    results = []
    for sharded in (False, True):
        place = folder / f"callbacks-{sharded}"
        runs = []
        for epochs in (1, 3):
            model = prepared(1, sharded)
            model.compile(adam(use_ema=True, ema_momentum=0.7), loss_function())
            given = [
                keras.callbacks.SwapEMAWeights(swap_on_epoch=True),
                keras.callbacks.ModelCheckpoint(str(place / "{epoch}.keras")),
            ]
            runs.append(
                model.fit(
                    *rows(),
                    batch_size=BATCH,
                    epochs=epochs,
                    shuffle=False,
                    verbose=0,
                    callbacks=given,
                    validation_data=rows(1),
                ).history["val_loss"]
            )
        results.append((runs, state(model, model.optimizer)))
        loaded = keras.saving.load_model(place / "3.keras")
        for weight, own in zip(loaded.trainable_variables, model.trainable_variables, strict=True):
            assert weight.shape == own.shape
        assert int(loaded.optimizer.iterations) == 12
    assert results[0][0] == results[1][0], results
    expect_same(results[1][1], results[0][1])


def resume(folder: Path) -> None:
    """fit that stops and goes on from smp.CheckpointOnPreemption, divided or not."""
    import opensmp as smp

    def fitted(sharded: bool, place: Path | None, epochs: int) -> Any:
        model = prepared(1, sharded)
        model.compile(adam(gradient_accumulation_steps=2), loss_function())
        given = []
        if place is not None:
            checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
            given.append(smp.CheckpointOnPreemption(smp.CheckpointManager(checkpoint, place), 3))
        x, y = rows(5)
        model.fit(x, y, batch_size=BATCH, epochs=epochs, verbose=0, shuffle=False, callbacks=given)
        return state(model, model.optimizer)

    expected = fitted(False, None, 3)
    for kinds in ((True, True), (True, False), (False, True)):
        place = folder / f"resume-{kinds[0]}-{kinds[1]}"
        fitted(kinds[0], place, 1)
        found = fitted(kinds[1], place, 3)
        assert len(found) == len(expected) or kinds[1]
        expect_same(found, expected)


def errors(folder: Path) -> None:
    """A step fails in one rank, the program catches it and trains on."""
    import opensmp as smp

    results = []
    for sharded in (False, True):
        model, optimizer = prepared(1, sharded), adam()
        train_step = step_of(model, optimizer)
        for number, batch in enumerate(batches()):
            inputs, labels = share(batch)
            train_step(inputs, labels)
            if number in (1, 2):
                try:
                    train_step(inputs + 1000 * (smp.rank() == 1), labels)  # no such token
                except Exception as error:
                    print(type(error).__name__, flush=True)
                else:
                    raise AssertionError("the step did not fail")
        results.append(state(model, optimizer))
    expect_same(results[1], results[0])


def others(folder: Path) -> None:
    """Calls that take an optimizer's variables."""
    import opensmp as smp
    from opensmp.errors import ElsewhereError

    model, optimizer = prepared(1, True), adam()
    model.compile(optimizer, loss_function())
    model.fit(*rows(), batch_size=BATCH, verbose=0)
    before = digests(state(model, optimizer))
    smp.broadcast_variables(optimizer.variables, root_rank=0)
    smp.broadcast_variables(optimizer.variables, root_rank=1, group=smp.DP_GROUP)
    assert digests(state(model, optimizer)) == before
    missing = [
        v
        for v in optimizer.variables
        if not any(v is own for own in smp.local_variables(optimizer.variables))
    ]
    assert missing
    for read in (missing[0].numpy, lambda: tf.function(lambda: missing[0] + 1.0)()):
        with pytest.raises(ElsewhereError, match=r"shard_optimizer_state.*smp\.local_variables"):
            read()
    assert len(model.get_weights()) == len(model.weights)
    model.evaluate(*rows(1), batch_size=BATCH, verbose=0)
    model.predict(rows(1)[0], batch_size=BATCH, verbose=0)


def main(folder: Path, names: list[str]) -> None:
    warnings.simplefilter("ignore")
    for name in names:
        globals()[name](folder)
        print(f"{name}: good", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
