"""Canaries of Keras' trainer and callbacks."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import output_of

from opensmp import _private


def compiled_model():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", metrics=["mae"])
    return model


def test_compiled_loss():
    model = compiled_model()
    assert float(_private.compiled_loss(model)(np.zeros((2, 1)), np.ones((2, 1)))) == 1.0


def test_compiled_metrics():
    assert _private.compiled_metrics(compiled_model()) is not None
    assert _private.compiled_metrics(keras.Sequential()) is None


def test_compiled_with():
    loss = keras.losses.Huber(0.5)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    assert _private.compiled_with(model) == {}
    model.compile("sgd", loss, loss_weights=[2.0], metrics=["mae"], steps_per_execution=3)
    given = _private.compiled_with(model)
    assert given["loss"] is loss
    assert (given["loss_weights"], given["metrics"]) == ([2.0], ["mae"])
    assert given["steps_per_execution"] == 3
    assert "weighted_metrics" in given


def test_function_within():
    function, given = _private.function_within(keras.losses.Huber(0.5))
    assert function is keras.losses.huber
    assert given["delta"] == 0.5
    function, given = _private.function_within(keras.metrics.TopKCategoricalAccuracy(k=3))
    assert callable(function)
    assert given["k"] == 3
    assert _private.function_within(keras.metrics.Mean()) is None
    assert _private.function_within(None) is None


def test_build_metrics():
    model = compiled_model()
    _private.build_metrics(model, tf.zeros([2, 1]), tf.zeros([2, 1]))
    assert _private.compiled_metrics(model).built


def test_build_loss__of_unknown_sizes():
    model = compiled_model()
    loss = _private.compiled_loss(model)
    unknown = keras.KerasTensor((None, 1))
    _private.build_loss(loss, tf.zeros([2, 1]), unknown)
    assert loss.built
    assert float(loss(tf.zeros([2, 1]), tf.ones([2, 1]))) == 1.0


def test_build_loss__makes_metrics_that_have_seen_nothing():
    x = keras.Input((2,))
    outputs = [keras.layers.Dense(1)(x), keras.layers.Dense(3)(x)]
    model = keras.Model(x, outputs)
    model.compile(loss=["mse", "mae"])
    loss = _private.compiled_loss(model)
    _private.build_loss(loss, [tf.ones([4, 1]), tf.ones([4, 3])], list(outputs))
    assert [float(metric.count) for metric in loss.metrics] == [0.0, 0.0]


def test_call_in_training():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dropout(0.5)])
    assert (np.asarray(_private.call_in_training(model, np.ones((4, 8)))) == 0.0).any()


def test_track_loss():
    model = compiled_model()
    _private.track_loss(model, tf.constant(1.0), 1)
    _private.track_loss(model, tf.constant(4.0), 2)
    assert float(model.metrics[0].result()) == 3.0


def test_rows_count():
    seen = []

    class Loss(keras.losses.Loss):
        def call(self, y_true, y_pred):
            seen.append(y_pred.shape[0])
            return y_pred[:, 0]

    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", Loss())

    @tf.function
    def run(x):
        with _private.rows_count(known=False):
            unknown = _private.compiled_loss(model)(x, x)
        with _private.rows_count(known=True):
            return unknown + _private.compiled_loss(model)(x, x)

    assert float(run(tf.ones([3, 1]))) == 2.0
    assert seen == [None, 3]


def test_track():
    metric = keras.metrics.Mean()
    with _private.rows_count(known=False):
        _private.track(metric, tf.constant(1.0), 5)
        _private.track(metric, tf.constant(3.0), 1)
    assert float(metric.result()) == 2.0


def test_tracked_values():
    metric = keras.metrics.Mean()
    with _private.tracked_values([metric]) as values:
        metric.update_state(tf.constant(7.0), sample_weight=2)
    assert float(values[id(metric)]) == 7.0
    assert float(metric.result()) == 0.0


def test_global_seed():
    tf.random.set_seed(17)
    assert _private.global_seed() == 17
    tf.random.set_seed(None)
    assert _private.global_seed() is None


def test_arrays_shuffled_by():
    """In the order that Keras' trainer meets them, for both ways to shuffle."""
    seen = []
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", run_eagerly=True)
    model.train_step = lambda data: (
        seen.append(data[0][:, 0].numpy().tolist()) or {"loss": tf.zeros([])}
    )
    x = np.arange(6.0, dtype="float32")[:, None]
    with _private.arrays_shuffled_by(lambda indices: indices[::-1]):
        model.fit(x, x, batch_size=4, verbose=0)
        model.fit(x, x, batch_size=6, verbose=0, shuffle="batch")
        tf.random.shuffle(x, seed=1)
    assert seen == [[5.0, 4.0, 3.0, 2.0], [1.0, 0.0], [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]]
    assert tf.random.shuffle.__module__.startswith("tensorflow.")


def test_overrides():
    logger = keras.callbacks.CSVLogger("there")
    assert _private.overrides(logger, "on_epoch_end")
    assert not _private.overrides(logger, "on_train_batch_end")
    each = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: None)
    assert _private.overrides(each, "on_train_batch_end")


def test_initial_epoch():
    model = compiled_model()
    assert _private.initial_epoch(model) is None


def test_set_initial_epoch():
    model = compiled_model()
    _private.set_initial_epoch(model, 2)
    history = model.fit(np.ones((2, 2)), np.ones((2, 1)), epochs=3, verbose=0)
    assert (_private.initial_epoch(model), history.epoch) == (2, [2])


def test_epochs_begun_by():
    """Of three batches the first is passed over."""
    model = compiled_model()
    seen = []

    def begin(epoch, make):
        for step in make():
            first, *_, data = step  # Keras 3.9 does not tell the last one
            seen.append((first, epoch.num_batches))
            if first == 0:
                next(data)
            else:
                yield step

    with _private.epochs_begun_by(begin):
        model.fit(np.ones((6, 2)), np.ones((6, 1)), batch_size=2, verbose=0)
    assert seen == [(0, 3), (1, 3), (2, 3)]
    assert int(model.optimizer.iterations) == 2


def orders_of(dataset, epochs, passed=0, **options):
    """What `fit` trains on in the epochs after the first `passed` of them."""
    seen = []
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", run_eagerly=True)
    model.train_step = lambda data: (
        seen.append(data[0][:, 0].numpy().tolist()) or {"loss": tf.zeros([])}
    )
    left = [passed]

    def begin(epoch, make):
        while left[0]:
            left[0] -= 1
            _private.pass_over_epoch(epoch, make(), 1, 4)
        yield from make()

    with _private.epochs_begun_by(begin):
        model.fit(dataset, epochs=epochs, initial_epoch=passed, verbose=0, **options)
    return seen


@pytest.mark.parametrize("kind", ["known", "unknown", "endless"])
def test_pass_over_epoch(kind):
    def make():
        x = np.arange(6.0, dtype="float32")[:, None]
        dataset = tf.data.Dataset.from_tensor_slices((x, x)).shuffle(6, seed=3).batch(2)
        if kind == "unknown":
            return dataset.filter(lambda x, y: True)
        return dataset.repeat() if kind == "endless" else dataset

    options = {"steps_per_epoch": 2} if kind == "endless" else {}
    whole = orders_of(make(), 4, **options)
    each = len(whole) // 4
    assert orders_of(make(), 4, passed=2, **options) == whole[2 * each :]
    assert whole[:each] != whole[each : 2 * each]


def test_global_seed_state():
    keras.utils.set_random_seed(3)
    before = np.asarray(_private.global_seed_state(make=True))
    keras.random.normal((1,))
    assert np.asarray(_private.global_seed_state()).tolist() != before.tolist()


def test_backup_path(tmp_path):
    backup = keras.callbacks.BackupAndRestore(str(tmp_path / "backup"), delete_checkpoint=False)
    compiled_model().fit(np.ones((2, 2)), np.ones((2, 1)), callbacks=[backup], verbose=0)
    assert _private.backup_path(backup) == str(tmp_path / "backup" / "latest.weights.h5")
    assert (tmp_path / "backup" / "latest.weights.h5").exists()


def test_kept_seeds():
    keras.utils.clear_session()
    keras.utils.set_random_seed(5)
    with _private.kept_seeds():
        drawn = tf.compat.v1.random.get_seed(None)
        keras.random.uniform([])
        assert _private.global_seed_state() is not None
    assert _private.global_seed_state() is None
    assert tf.compat.v1.random.get_seed(None) == drawn
    keras.random.uniform([])
    known = _private.global_seed_state().numpy()
    with _private.kept_seeds():
        pass
    np.testing.assert_array_equal(_private.global_seed_state().numpy(), known)


def test_kept_seeds_where_none_was_set():
    out = output_of(
        """
import tensorflow as tf
from opensmp import _private
with _private.kept_seeds():
    tf.random.set_seed(1)
print("kept")
"""
    )
    assert out == "kept"
