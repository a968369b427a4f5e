"""The two loops of the API's own documentation, word for word but for the directory."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from small import MANUAL, Net, batch

import smdistributed.modelparallel.tensorflow as smp


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """What `/opt/ml/checkpoints`, the default, is in these tests."""
    defaults = smp.CheckpointManager.__init__.__defaults__
    assert defaults[0] == "/opt/ml/checkpoints"
    monkeypatch.setattr(
        smp.CheckpointManager.__init__, "__defaults__", (str(tmp_path), *defaults[1:])
    )
    return tmp_path


def made(seed):
    keras.utils.set_random_seed(seed)
    model = Net()
    optimizer = keras.optimizers.Adam(0.01)

    @smp.step
    def forward_backward(x):
        loss = tf.reduce_mean(model(x, training=True) ** 2)
        return optimizer.get_gradients(loss, model.trainable_variables), loss

    def train_step(x):
        gradients, loss = forward_backward(x)
        gradients = [g.accumulate() for g in gradients]
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return float(loss.reduce_mean())

    return model, optimizer, train_step


def test_the_loops_of_the_documentation(smp_init, directory):
    smp_init({**MANUAL, "partitions": 2, "microbatches": 2})
    train_ds = [batch() for _ in range(3)]
    model, optimizer, train_step = made(1)
    checkpoint = tf.train.Checkpoint(optimizer=optimizer, model=model)
    ckpt_manager = smp.CheckpointManager(checkpoint, max_to_keep=5)  # use /opt/ml/checkpoints

    for inputs in train_ds:
        loss = train_step(inputs)
        # [...]
        ckpt_manager.save()  # save a new checkpoint in /opt/ml/checkpoints
    assert len(ckpt_manager.checkpoints) == 3
    expected = [train_step(inputs) for inputs in train_ds[1:]]

    smp_init({"partitions": 2, "microbatches": 2})
    model, optimizer, train_step = made(2)
    checkpoint = tf.train.Checkpoint(optimizer=optimizer, model=model)
    ckpt_manager = smp.CheckpointManager(checkpoint, max_to_keep=5)
    losses = []
    for step, inputs in enumerate(train_ds):
        if step == 1:  # NOTE: restore occurs on the second step  # fmt: skip
            ckpt_manager.restore()
        loss = train_step(inputs)
        losses.append(loss)
    assert losses[0] != expected[0]
    np.testing.assert_allclose(losses[1:], expected, rtol=1e-6)
    assert int(optimizer.iterations) == 5


class PlainNet(keras.Model):
    """The layers of `Net`, in plain Keras."""

    def __init__(self):
        super().__init__()
        self.hidden = keras.layers.Dense(4, activation="tanh", name="hidden")
        self.top = keras.layers.Dense(3, name="top")

    def call(self, x):
        return self.top(self.hidden(x))


def test_plain_checkpoints_pass_both_ways(smp_init, tmp_path):
    smp_init({**MANUAL, "partitions": 2, "microbatches": 2})
    plain, model = PlainNet(), Net()
    plain(batch())
    model(batch())
    path = tf.train.Checkpoint(model=plain).save(str(tmp_path / "plain"))

    smp.CheckpointManager(tf.train.Checkpoint(model=model), tmp_path / "a").restore(path)
    for mine, theirs in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)

    other = Net()
    other(batch())
    tf.train.Checkpoint(model=other).restore(path).expect_partial()  # TensorFlow's own restore
    for mine, theirs in zip(other.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)

    model.set_weights([weight + 1 for weight in model.get_weights()])
    path = smp.CheckpointManager(tf.train.Checkpoint(model=model), tmp_path / "b").save()
    tf.train.Checkpoint(model=plain).restore(path).assert_existing_objects_matched()
    for mine, theirs in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)
