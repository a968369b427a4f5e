"""Processes that do not do the same in `fit` are told so, all of them, and nothing hangs."""

from __future__ import annotations

import keras
from processes import check_ranks
from turns import turn

from opensmp.training.meeting import agree_on_chance, is_shared, meet, meet_at_batch


def test_alone_there_is_nobody_to_meet(smp_init):
    smp_init({"partitions": 2})
    assert not is_shared()
    assert meet("begin", 3) == [3]
    assert meet_at_batch("train", ()) is None
    assert agree_on_chance() is None


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
        "not at the same point", "a batch of 8 examples", "a batch of 4 examples",
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
        except OSError as error:
            assert rank == 0
            raise smp.StepError(f"Fails.on_epoch_end failed in rank 0: OSError: {error}") from error


    check("a callback that fails in rank 0", fails, "Fails.on_epoch_end", "no space left")

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
        assert len(refused) == 12 + hasattr(keras.callbacks, "OrbaxCheckpoint")
        assert result.lines[-1] == "all well"
