"""Checkpoints of training: saved under one set-up, restored under another."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from small import MANUAL, Net, batch

import opensmp as smp


def training(seed, model=None):
    keras.utils.set_random_seed(seed)
    model = model or Net()
    optimizer = keras.optimizers.Adam(0.01)

    @smp.step
    def gradients(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x, training=True) ** 2)
        return tape.gradient(loss, model.trainable_variables), loss

    def train():
        found, loss = gradients(batch())
        found = [g.accumulate() for g in found]
        optimizer.apply_gradients(zip(found, model.trainable_variables, strict=True))
        return float(loss.reduce_mean())

    return model, optimizer, train


@pytest.mark.parametrize("when", ["before the first step", "at the second step"])
def test_a_checkpoint_of_two_partitions_goes_on_under_another_plan(smp_init, tmp_path, when):
    smp_init({**MANUAL, "partitions": 2, "microbatches": 2})
    model, optimizer, train = training(1)
    manager = smp.CheckpointManager(
        tf.train.Checkpoint(model=model, optimizer=optimizer), tmp_path, max_to_keep=1
    )
    for _ in range(2):
        train()
        manager.save()
    assert [path.rsplit("/", 1)[1] for path in manager.checkpoints] == ["ckpt-2"]
    assert tf.train.latest_checkpoint(tmp_path) == manager.latest_checkpoint
    expected = [train(), train()]
    smp_init({"partitions": 2, "microbatches": 2})
    model, optimizer, train = training(2)
    manager = smp.CheckpointManager(tf.train.Checkpoint(model=model, optimizer=optimizer), tmp_path)
    if when == "at the second step":
        train()
    assert manager.restore() == manager.latest_checkpoint
    np.testing.assert_allclose([train(), train()], expected, rtol=1e-6)


def test_plain_keras_reads_a_checkpoint_of_partitions(smp_init, tmp_path):
    smp_init({**MANUAL, "partitions": 2, "microbatches": 2})
    model, _, train = training(1)
    train()
    path = smp.CheckpointManager(tf.train.Checkpoint(model=model), tmp_path).save()
    reader = tf.train.load_checkpoint(path)
    kernel = reader.get_tensor("model/hidden/_kernel/.ATTRIBUTES/VARIABLE_VALUE")
    assert np.array_equal(kernel, model.hidden.kernel.numpy())


def test_a_torn_checkpoint_is_left_out_with_a_warning(smp_init, tmp_path):
    smp_init({**MANUAL, "partitions": 2, "microbatches": 2})
    model, optimizer, train = training(1)
    manager = smp.CheckpointManager(tf.train.Checkpoint(model=model, optimizer=optimizer), tmp_path)
    train()
    good = manager.save()
    torn = manager.save()
    for file in tmp_path.glob("ckpt-2.data*"):
        file.write_bytes(file.read_bytes()[:10])
    with pytest.warns(UserWarning, match=r"ckpt-2 is damaged.* has 10 bytes"):
        assert manager.restore() == good
    with pytest.raises(smp.CheckpointError, match=r"The newest good one here is .*ckpt-1"):
        manager.restore(torn)


def test_another_model_is_an_error_with_both_shapes_and_changes_nothing(smp_init, tmp_path):
    smp_init({**MANUAL, "partitions": 2, "microbatches": 2})
    model, _, train = training(1)
    train()
    path = smp.CheckpointManager(tf.train.Checkpoint(model=model), tmp_path).save()
    other, _, train = training(1, Net(units=7))
    train()
    before = other.get_weights()
    manager = smp.CheckpointManager(tf.train.Checkpoint(model=other), tmp_path)
    with pytest.raises(smp.CheckpointError, match=r"\(4, 3\) float32 .* \(4, 7\) float32"):
        manager.restore(path)
    assert all(map(np.array_equal, before, other.get_weights()))


def test_a_path_without_checkpoint_is_an_error(smp_init, tmp_path):
    smp_init({"partitions": 1})
    manager = smp.CheckpointManager(tf.train.Checkpoint(step=tf.Variable(1)), tmp_path)
    assert manager.restore() is None
    with pytest.raises(smp.CheckpointError, match=r"there is no file ckpt-9\.index"):
        manager.restore(tmp_path / "ckpt-9")
