"""Processes that do not do the same in `fit` are told so, all of them, and nothing hangs."""

from __future__ import annotations

import keras
from processes import check_ranks
from turns import turn

from opensmp.training.sync.sync import (
    agree_on_chance,
    in_call,
    is_in_call,
    is_shared,
    meet,
    meet_at_batch,
    meet_to_begin,
    meet_with,
)


def test_alone_there_is_nobody_to_meet(smp_init):
    smp_init({"partitions": 2})
    assert not is_shared()
    assert meet("begin", 3) == [3]
    assert meet_at_batch("train", ()) is None
    assert meet_with({"loss": "mse"}, "begin", 3) == [3]
    assert meet_to_begin({"loss": "mse"}) is None
    assert agree_on_chance({"loss": "mse"}) is None


def test_batches_of_a_call_know_that_they_are_in_it():
    assert not is_in_call()
    with in_call():
        with in_call():
            assert is_in_call()
        assert is_in_call()
    assert not is_in_call()


MISUSE = """
    import random

    import keras
    import numpy as np
    import tensorflow as tf

    import opensmp as smp
    from training.uses import classifier, data

    smp.init()
    rank = smp.rank()
    x, y = (a.astype("float32") for a in data(16))


    def model(**options):
        keras.utils.set_random_seed(1)
        return smp.DistributedModel.from_keras(classifier(**options))


    def check(what, use, *words):
        try:
            use()
        except smp.StepError as error:
            text = str(error)
            assert all(word in text for word in words), (what, text)
            print("refused:", what, flush=True)
        else:
            raise AssertionError(f"{what} was not refused")


    fit = {"batch_size": 8, "verbose": 0, "shuffle": False}
    check(
        "other labels", lambda: model().fit(x, y + rank % 2, **fit),
        "different batches", "in rank 1", "float32 [8]", "smp.shard",
    )
    check(
        "a part of the data", lambda: model().fit(x[rank * 8 :][:8], y[rank * 8 :][:8], **fit),
        "different batches",
    )
    check(
        "another batch size",
        lambda: model().fit(x, y, **{**fit, "batch_size": 8 >> rank}),
        "batch_size: 8 in rank 0; 4 in rank 1",
    )
    check(
        "another batch size of a dataset",
        lambda: model().fit(tf.data.Dataset.from_tensor_slices((x, y)).batch(8 >> rank), verbose=0),
        "not at the same point", "a batch of 8 examples", "a batch of 4 examples",
        "share the outcome of each trial with smp.allgather",
    )
    check(
        "fewer batches in fit", lambda: model().fit(x[: 16 - 8 * rank], y[: 16 - 8 * rank], **fit),
        "Rank 0 is about to train on a batch of 8 examples, rank 1 is about to end epoch 1",
    )
    endless = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    check(
        "fewer batches of a dataset", lambda: model().fit(endless.take(2 - rank), verbose=0),
        "end epoch 1",
    )
    check(
        "fewer batches in evaluate",
        lambda: model().evaluate(x[: 16 - 8 * rank], y[: 16 - 8 * rank], batch_size=8, verbose=0),
        "evaluate on a batch of 8 examples", "end evaluate",
    )
    check(
        "fewer batches in predict",
        lambda: model().predict(x[: 16 - 8 * rank], batch_size=8, verbose=0),
        "predict on a batch of 8 examples", "end predict",
    )
    check(
        "another batch of train_on_batch", lambda: model().train_on_batch(x + rank, y),
        "different batches",
    )
    check(
        "a dataset in another order",
        lambda: model().fit(endless.unbatch().shuffle(16, seed=5 + rank).batch(8), verbose=0),
        "dataset.shuffle(1000, seed=0)",
    )
    check(
        "run_eagerly", lambda: model(run_eagerly=True).fit(x, y, **fit),
        "run_eagerly=False", "without a launcher",
    )
    check(
        "a CallbackList",
        lambda: model().fit(x, y, callbacks=keras.callbacks.CallbackList([]), **fit),
        "a list of callbacks",
    )
    if hasattr(keras.callbacks, "OrbaxCheckpoint"):  # Keras 3.13 and later
        orbax = keras.callbacks.OrbaxCheckpoint.__new__(keras.callbacks.OrbaxCheckpoint)
        check(
            "OrbaxCheckpoint", lambda: model().fit(x, y, callbacks=[orbax], **fit),
            "smp.CheckpointManager",
        )


    class Fails(keras.callbacks.ModelCheckpoint):
        def on_epoch_end(self, epoch, logs=None):
            assert rank == 0
            raise OSError("no space left on the device")


    def fails():
        try:
            model().fit(x, y, callbacks=[Fails("a.keras")], **fit)
        except OSError as error:  # in all ranks
            assert rank == 0 or "raised in rank 0" in str(error), error
            raise smp.StepError(str(error)) from error


    check("a callback that fails in rank 0", fails, "no space left")

    # What is shuffled without a seed has the same order everywhere, and another in each epoch.
    tf.random.set_seed(None)
    random.seed(rank)
    seen = []


    class Recorded(keras.Model):
        def train_step(self, data):
            tf.numpy_function(lambda x: seen.append(x[:, 0].tolist()), [data[0]], [])
            return super().train_step(data)


    inputs = keras.Input((6,))
    recorded = Recorded(inputs, keras.layers.Dense(4, activation="softmax")(inputs))
    recorded = smp.DistributedModel.from_keras(recorded)
    recorded.compile("sgd", "sparse_categorical_crossentropy")
    recorded.fit(x, y, batch_size=16, epochs=3, verbose=0)
    recorded.fit(x, y, batch_size=4, epochs=1, verbose=0, shuffle="batch")
    assert len(seen) == 7, seen
    orders = smp.allgather(seen)
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in seen[:3]}) == 3
    assert sorted(seen[0]) == sorted(x[:, 0].tolist())
    assert all(sorted(batch) != batch for batch in seen[3:5]) and sum(seen[3:], []) != seen[0]
    print("all well", flush=True)
"""


@turn(1, of=2)
def test_processes_with_other_data_or_other_calls_are_all_told():
    results = check_ranks(MISUSE, 2, {"partitions": 2, "microbatches": 2})
    for result in results:
        refused = [line for line in result.lines if line.startswith("refused")]
        assert len(refused) == 13 + hasattr(keras.callbacks, "OrbaxCheckpoint")
        assert result.lines[-1] == "all well"


GIVEN = """
    import keras
    import numpy as np

    import opensmp as smp

    smp.init()
    rank = smp.rank()
    x = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
    y = x.sum(1, keepdims=True)
    FIT = {"batch_size": 8, "verbose": 0, "shuffle": False}
    EARLIER = "an error that only one rank caught earlier: such a rank is one call ahead"


    def network(units=8, rate=0.5, trainable=True):
        layers = [keras.layers.Dense(units), keras.layers.Dropout(rate), keras.layers.Dense(1)]
        layers[0].trainable = trainable
        return keras.Sequential([keras.Input((4,)), *layers])


    def model(optimizer=None, loss="mse", of=None, seed=0, **options):
        keras.utils.set_random_seed(seed)
        made = smp.DistributedModel.from_keras(network(**(of or {})))
        made.compile(optimizer or keras.optimizers.SGD(0.01), loss, **options)
        return made


    def own_loss(power):
        def loss(y, prediction):
            return keras.ops.mean(keras.ops.abs(y - prediction) ** power, axis=-1)

        return loss


    class Own(keras.losses.Loss):
        def __init__(self, power):
            super().__init__()
            self.power = power

        def call(self, y, prediction):
            return own_loss(self.power)(y, prediction)


    def refused(use, *words):
        try:
            use()
        except smp.StepError as error:
            text = str(error)
            assert all(word in text for word in (*words, EARLIER)), text
            assert smp.allgather(words[0]) == [words[0]] * smp.size()
            print("refused:", words[0], flush=True)
        else:
            raise AssertionError(f"{words} was not refused")


    def fit(given=None, **options):
        return model(**options).fit(x, y, **{**FIT, **(given or {})})


    sgd, adam = keras.optimizers.SGD, keras.optimizers.Adam
    decay = keras.optimizers.schedules.ExponentialDecay
    refused(
        lambda: fit(optimizer=sgd([0.05, 0.001][rank])),
        "the optimizer's learning_rate: 0.05 in rank 0; 0.001 in rank 1",
    )


    def fit_with_a_rate_set_later():
        made = model()
        made.optimizer.learning_rate = 0.5 - rank / 4
        made.fit(x, y, **FIT)


    refused(fit_with_a_rate_set_later, "the optimizer's learning_rate: 0.5 in rank 0; 0.25 in rank")
    refused(
        lambda: fit(optimizer=sgd(decay(0.1, 10 + rank, 0.5))),
        "the optimizer's learning_rate: ", "'decay_steps': 10", "'decay_steps': 11",
    )
    refused(
        lambda: fit(optimizer=[sgd, adam][rank](0.01)),
        "the optimizer: ", "SGD in rank 0; ", "Adam in rank 1",
    )
    refused(lambda: fit(optimizer=sgd(0.01, clipnorm=[None, 1.0][rank])), "clipnorm: None in rank")
    refused(lambda: fit(optimizer=sgd(0.01, use_ema=bool(rank))), "use_ema: False in rank 0; True")
    refused(lambda: fit(loss=["mse", "mae"][rank]), "loss: 'mse' in rank 0; 'mae' in rank 1")
    refused(lambda: fit(loss=own_loss(1 + rank)), "loss: ", "own_loss.<locals>.loss", "power=2")
    refused(lambda: fit(loss=Own(1 + rank)), "loss: ", "Own(", "power=2")
    refused(lambda: fit(loss_weights=[1.0 + rank]), "loss_weights: [1.0] in rank 0; [2.0] in rank")
    refused(lambda: fit(metrics=["mae", "mse"][: 1 + rank]), "metrics: ['mae'] in rank 0")
    refused(lambda: fit(weighted_metrics=[["mae"], ["mse"]][rank]), "weighted_metrics: ")
    refused(lambda: fit({"epochs": 1 + rank}), "epochs: 1 in rank 0; 2 in rank 1")
    refused(lambda: fit({"class_weight": [None, {0: 2.0}][rank]}), "class_weight: None in rank 0")
    refused(lambda: fit({"sample_weight": [None, x[:, 0]][rank]}), "sample_weight: none in rank 0")
    refused(lambda: fit({"validation_data": [None, (x, y)][rank]}), "validation_data: none in rank")
    refused(
        lambda: fit(of={"units": 8 + rank}),
        "the weights, number 1: ", "dense/kernel [4, 8] float32, trained in rank 0", "[4, 9]",
    )
    refused(lambda: fit(of={"rate": 0.5 + rank / 4}), "the layers, number 2: ", "rate=0.75")
    refused(lambda: fit(of={"trainable": rank == 0}), "not trained in rank 1")
    refused(lambda: fit(seed=rank), "the seed: 0 in rank 0; 1 in rank 1")
    refused(
        lambda: model().fit(x, y, **FIT) if rank else model().evaluate(x, y, verbose=0),
        "the method: evaluate in rank 0; fit in rank 1",
    )
    refused(lambda: model(loss=["mse", "mae"][rank]).evaluate(x, y, verbose=0), "loss: 'mse'")
    refused(
        lambda: model().predict(x, batch_size=8 >> rank, verbose=0),
        "batch_size: 8 in rank 0; 4 in rank 1",
    )
    refused(
        lambda: model(sgd(0.1 + rank)).train_on_batch(x, y), "the optimizer's learning_rate: 0.1",
    )
    refused(lambda: model(loss=["mse", "mae"][rank]).test_on_batch(x, y), "loss: 'mse' in rank 0")

    # A search in which one rank alone catches an error: it is one trial ahead.
    trials, results = iter([0.1, 0.01, 0.001]), []
    for number, rate in enumerate(trials):
        try:
            made = model(sgd(rate))
            if number == 1 and rank == 1:
                raise MemoryError("of this rank alone")
            made.fit(x, y, **FIT)
            results.append(rate)
        except MemoryError:
            continue
        except smp.StepError as error:
            assert "learning_rate: 0.01" in str(error) and EARLIER in str(error), error
            break
    assert results == [0.1], results
    print("refused: one trial ahead", flush=True)

    # With the outcome of what a rank does on its own shared, all ranks have the same trials.
    results = []
    for number, rate in enumerate((0.1, 0.01, 0.001)):
        try:
            if number == 1 and rank == 1:
                raise MemoryError("of this rank alone")
            made, error = model(sgd(rate)), None
        except MemoryError as caught:
            made, error = None, caught
        if any(smp.allgather(error is not None)):
            continue
        made.fit(x, y, **FIT)
        results.append(rate)
    assert smp.allgather(results) == [[0.1, 0.001]] * 2, results

    # Equal programs train, though one rank has made layers, metrics and optimizers of its own.
    if rank:
        network(), sgd(0.3), keras.metrics.Mean(), keras.layers.Dropout(0.1)
    callbacks = [keras.callbacks.Callback()] * rank
    losses = [
        fit(optimizer=sgd(decay(0.1, 10, 0.5), momentum=0.5), loss=own_loss(2), metrics=["mae"]),
        fit(
            loss=lambda y, p: keras.ops.square(y - p),
            weighted_metrics=[keras.metrics.MeanSquaredError()],
        ),
        fit({"validation_data": (x, y), "epochs": 2, "callbacks": callbacks}, loss=Own(2)),
    ]
    losses = [each.history["loss"] for each in losses]
    assert smp.allgather(losses) == [losses] * 2
    made = model(metrics=[keras.metrics.MeanAbsoluteError()])
    for rate in (0.1, 0.05):
        made.optimizer.learning_rate = rate
        made.train_on_batch(x, y)
        made.test_on_batch(x, y)
    made.fit(x, y, **FIT)
    scores = made.evaluate(x, y, verbose=0)
    assert smp.allgather(scores) == [scores] * 2
    assert made.predict(x, verbose=0).shape == (16, 1)
    print("all well", flush=True)
"""


def test_processes_that_were_given_other_things_are_all_told_and_go_on():
    results = check_ranks(GIVEN, 2, {"partitions": 2, "microbatches": 2})
    for result in results:
        assert len([line for line in result.lines if line.startswith("refused")]) == 26
        assert result.lines[-1] == "all well"
