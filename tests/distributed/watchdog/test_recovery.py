from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from patience import patient
from processes import check_ranks, run_ranks

from opensmp.distributed.watchdog.monitor import ENDED_BY_PEER

MODEL = """
import json, os, sys, time
import numpy as np
import keras, tensorflow as tf
import opensmp as smp

smp.init()
RANK = smp.rank()
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def data(bad=False):
    numbers = np.random.RandomState(0)
    x = numbers.randint(0, 10, (8, 4)).astype("int32")
    y = numbers.randint(0, 3, (8,))
    if bad:
        x[5, 2] = 77  # no row of the embedding
    return x, y


def layers():
    keras.utils.set_random_seed(1)
    last = smp.pp_size() - 1
    with smp.partition(0):
        inputs = keras.Input((4,), dtype="int32")
        x = keras.layers.Embedding(10, 8, name="table")(inputs)
    with smp.partition(last):
        x = keras.layers.Flatten()(x)
        outputs = keras.layers.Dense(3, name="top")(x)
    return inputs, outputs


def make(kind=smp.DistributedModel):
    plain = keras.Model(*layers())
    return kind.from_keras(plain) if kind is smp.DistributedModel else kind(plain)


def attempt(work):
    began = time.time()
    try:
        found = work()
    except Exception as error:
        found = [type(error).__name__, str(error)]
    return found, time.time() - began


def tell(name, work):
    found, seconds = attempt(work)
    print("RESULT", json.dumps([name, found, seconds]), flush=True)
"""

TRIALS = """
def custom(bad, compiled, wrong=None):
    model, optimizer = make(), keras.optimizers.SGD(0.1)

    @smp.step
    def step(x, y):
        if wrong == "trace":
            raise KeyError("a bug in one rank")
        with tf.GradientTape() as tape:
            loss = LOSS(y, model(x, training=True))
        return tape.gradient(loss, model.trainable_variables), loss

    def train(x, y):
        gradients, loss = step(x, y)
        gradients = [smp.allreduce(each.accumulate()) for each in gradients]
        optimizer.apply_gradients(zip(gradients, model.trainable_variables))
        return smp.allreduce(loss.reduce_mean())

    x, y = data(bad)
    if wrong == "rows":
        x, y = x[:7], y[:7]
    x, y = smp.shard((x, y))
    run = tf.function(train) if compiled else train
    return [float(run(tf.constant(x), tf.constant(y))) for _ in range(3)]


def fitted(bad=False, kind=smp.DistributedModel, callbacks=(), dataset=None):
    model = make(kind)
    model.compile("sgd", LOSS)
    x, y = data(bad)
    given = (x, y) if dataset is None else (dataset(x, y),)
    size = {"batch_size": 8} if dataset is None else {}
    history = model.fit(*given, **size, epochs=3, verbose=0, callbacks=list(callbacks))
    return history.history["loss"]


def predicted(bad):
    model = make()
    return model.predict(data(bad)[0], batch_size=8, verbose=0).sum().item()
"""

STEPS = (
    MODEL
    + TRIALS
    + """
tell("good", lambda: custom(False, True))
tell("eager", lambda: custom(True, False))
tell("function", lambda: custom(True, True))
tell("good", lambda: custom(False, False))
tell("trace", lambda: custom(False, False, "trace" if RANK == 1 else None))
tell("trace", lambda: custom(False, True, "trace" if RANK == 0 else None))
tell("rows", lambda: custom(False, False, "rows" if RANK == 1 else None))
tell("both", lambda: custom(False, True, "rows"))
tell("differ", lambda: custom(False, False, "rows" if RANK == 1 else "trace"))
tell("good", lambda: custom(False, True))
tell("gather", lambda: smp.allgather(RANK))
"""
)

FITS = (
    MODEL
    + TRIALS
    + """
class Own(smp.DistributedModel):
    def __init__(self, plain):
        super().__init__()
        self.plain = plain

    def call(self, x, training=None):
        return self.plain(x, training=training)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_weights)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_weights))
        return {"loss": loss}


class Raises(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if RANK == 1:
            raise LookupError("a callback of one rank")


def broken(x, y):
    def rows():
        if RANK == 1:
            raise OSError("a file of one rank")
        yield x, y
    signature = (tf.TensorSpec((8, 4), tf.int32), tf.TensorSpec((8,), tf.int64))
    return tf.data.Dataset.from_generator(rows, output_signature=signature)


tell("fit", lambda: fitted(True))
tell("callback", lambda: fitted(callbacks=[Raises()]))
tell("dataset", lambda: fitted(dataset=broken))
tell("own step", lambda: fitted(True, Own))
tell("predict", lambda: predicted(True))
tell("fit good", fitted)
"""
)

ERRORS = {
    "eager": ("InvalidArgumentError", "= 77 is not in [0, 10)"),
    "function": ("InvalidArgumentError", "= 77 is not in [0, 10)"),
    "trace": (None, "a bug in one rank"),  # AutoGraph gives it a class of its own
    "rows": ("StepError", "7"),
    "both": ("StepError", "7"),
    "differ": (None, ""),
    "fit": ("InvalidArgumentError", "= 77 is not in [0, 10)"),
    "callback": ("LookupError", "a callback of one rank"),
    "dataset": (None, "a file of one rank"),
    "own step": ("InvalidArgumentError", "= 77 is not in [0, 10)"),
    "predict": ("InvalidArgumentError", "= 77 is not in [0, 10)"),
}


def data(bad: bool = False) -> Any:
    numbers = np.random.RandomState(0)
    return numbers.randint(0, 10, (8, 4)).astype("int32"), numbers.randint(0, 3, (8,))


def plain_losses(rate: float, microbatches: int = 1) -> list[float]:
    """Losses of the model of the scripts in plain Keras, over the same microbatches."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((4,), dtype="int32")
    x = keras.layers.Flatten()(keras.layers.Embedding(10, 8)(inputs))
    model = keras.Model(inputs, keras.layers.Dense(3)(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.SGD(rate)
    found = []
    for _ in range(3):
        parts, total = [], 0.0
        for x, y in zip(*(np.split(each, microbatches) for each in data()), strict=True):
            with tf.GradientTape() as tape:
                value = loss(y, model(x, training=True)) / microbatches
            parts.append(tape.gradient(value, model.trainable_variables))
            total += float(value)
        sums = [sum(map(tf.convert_to_tensor, each)) for each in zip(*parts, strict=True)]
        optimizer.apply_gradients(zip(sums, model.trainable_variables, strict=True))
        found.append(total)
    return found


def results(result: Any) -> list[tuple[str, Any, float]]:
    return [tuple(json.loads(line[7:])) for line in result.lines if line.startswith("RESULT ")]


def check_search(ranks: Sequence[Any], expected: dict[str, Any]) -> None:
    """Each trial ended alike in all ranks: with the error of one, or with the right numbers."""
    told = [results(rank) for rank in ranks]
    for rows in zip(*told, strict=True):
        names, found, seconds = zip(*rows, strict=True)
        assert len(set(names)) == 1, rows
        name = names[0]
        if name not in ERRORS:
            for each in found:
                np.testing.assert_allclose(each, expected[name], rtol=1e-6, err_msg=name)
            continue
        kind, text = ERRORS[name]
        assert len({each[0] for each in found}) == 1, rows
        # In a rank with several cores, TensorFlow may report that a reduction of the step was
        # cancelled, and not what has cancelled it. All raise that one, and go on.
        is_hidden = all(each[0] == "CancelledError" for each in found)
        assert is_hidden or all(kind in (None, e[0]) and text in e[1] for e in found), rows
        assert max(seconds) < patient(60), rows  # of a busy machine; it was minutes


@pytest.mark.parametrize("script", [STEPS, FITS], ids=["steps", "fits"])
def test_a_search_over_parameters_survives_errors_of_single_ranks(script):
    config = {"partitions": 2, "microbatches": 2}
    ranks = check_ranks(script, 2, config=config)
    good = {"good": plain_losses(0.1, 2), "fit good": plain_losses(0.01), "gather": [0, 1]}
    check_search(ranks, good)


REPLICAS = (
    MODEL
    + TRIALS
    + """
tell("function", lambda: custom(True, True))
tell("trace", lambda: custom(False, True, "trace" if RANK == 1 else None))
tell("good", lambda: custom(False, True))
tell("fit", lambda: fitted(True))
tell("good", lambda: custom(False, False))
"""
)


@pytest.mark.parametrize(("ranks", "partitions"), [(2, 1), (4, 2)])
def test_replicas_survive_errors_of_one_of_them(ranks, partitions):
    config = {"partitions": partitions, "microbatches": 2}
    found = check_ranks(REPLICAS, ranks, config=config)
    check_search(found, {"good": plain_losses(0.1, 4)})


LATE = (
    MODEL
    + """
with smp.partition(0):
    inputs = keras.Input((4,))
    x = keras.layers.Dense(2, use_bias=False)(inputs)
with smp.partition(1):
    outputs = keras.layers.Dense(2)(x)
model = smp.DistributedModel.from_keras(keras.Model(inputs, outputs))


@smp.step
def step(x):
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(x, training=True))
    return tape.gradient(loss, model.trainable_variables), loss


@tf.function
def train(x, fails):
    gradients, loss = step(x)
    gradients = [each.accumulate() for each in gradients]
    if RANK == 0:
        tf.debugging.assert_less(fails + 0.0 * tf.reduce_sum(gradients[0]), 1.0, "too late")
    return loss.reduce_mean()


for fails in (0.0, 2.0, 0.0, 0.0):
    print(attempt(lambda: train(tf.ones((4, 4)), tf.constant(fails)))[0], flush=True)
print("AT", time.time(), flush=True)
smp.barrier()
"""
)


def test_ranks_that_are_no_longer_at_the_same_call_end_with_the_cause():
    config = {"partitions": 2, "microbatches": 2}
    results = run_ranks(LATE, 2, config=config)
    assert all(result.code == ENDED_BY_PEER for result in results), results
    for result in results:
        assert "rank 0 failed: InvalidArgumentError" in result.output
        assert "too late" in result.output
        assert "the ranks cannot go on together" in result.output


UNCAUGHT = (
    MODEL
    + TRIALS
    + """
print("AT", time.time(), flush=True)
custom(True, True)
"""
)


def test_an_error_that_nothing_catches_ends_all_ranks_with_the_cause():
    config = {"partitions": 2, "microbatches": 2}
    results = run_ranks(UNCAUGHT, 2, config=config, fresh=True)
    assert results[0].code == 1
    assert results[1].code == ENDED_BY_PEER
    assert "rank 1 ends: rank 0 failed: InvalidArgumentError" in results[1].output
    assert abs(results[1].at - results[0].at) < patient(15)
