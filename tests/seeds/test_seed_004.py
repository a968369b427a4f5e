"""The three examples of "Does keras.models.load_model function correctly with MirroredStrategy?".

Where the seed is wrong, or its Keras is not there any more, a comment says what stands here.
"""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import tensorflow as tf
from tensorflow import keras

import opensmp as smp

X = np.random.default_rng(0).normal(size=(8, 5)).astype("float32")
Y = np.random.default_rng(1).normal(size=(8, 10)).astype("float32")


def two_replicas():
    # MirroredStrategy() has as many replicas as there are GPUs; here it gets two CPUs.
    return tf.distribute.MirroredStrategy(
        ["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )


@pytest.fixture(autouse=True)
def _there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def trained(strategy):
    with strategy.scope():
        # The seed's model has no input shape, and `...` in place of arguments.
        model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(10)])
        model.compile("adam", "mse")
        model.fit(X, Y, batch_size=8, verbose=0)
    return model


def assert_same(model, other):
    for one, two in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)


def test_example_1_a_direct_load_with_another_strategy(smp_init):
    # Training with MirroredStrategy (assume 2 GPUs available)
    model = trained(two_replicas())
    model.save("model_incorrect.h5")

    # Attempting to load without MirroredStrategy: "potential issues here".
    with pytest.raises(ValueError, match="Could not deserialize"):
        keras.models.load_model("model_incorrect.h5")
    model_loaded = smp.load_model("model_incorrect.h5")
    assert_same(model_loaded, model)
    assert int(model_loaded.optimizer.iterations) == 1
    smp_init({"partitions": 2})
    split = smp.load_model("model_incorrect.h5")
    assert isinstance(split, smp.DistributedModel)
    np.testing.assert_allclose(split(X), model_loaded(X), rtol=1e-5, atol=1e-6)
    split.fit(X, Y, batch_size=8, verbose=0)


def test_example_2_weights_and_configuration_by_hand():
    model = trained(two_replicas())
    weights = model.get_weights()
    model_config = model.get_config()
    # np.save cannot make one array of arrays of different shapes; and with allow_pickle a file
    # runs code of whoever wrote it. np.savez keeps them apart.
    np.savez("model_weights.npz", *weights)
    with open("model_config.json", "w") as f:
        json.dump(model_config, f)

    # Loading with MirroredStrategy (or even without)
    strategy_load = two_replicas()  # Could also be None
    with strategy_load.scope():  # Or removed entirely
        # keras.models.model_from_config is not there in Keras 3.
        reconstructed_model = keras.Sequential.from_config(model_config)
        stored = np.load("model_weights.npz", allow_pickle=False)
        reconstructed_model.set_weights([stored[name] for name in stored.files])
    assert_same(reconstructed_model, model)


def test_example_2_in_two_calls():
    model = trained(two_replicas())
    smp.save_model(model, "model.json")
    assert_same(smp.load_model("model.json"), model)
    with two_replicas().scope():
        other = smp.load_model("model.json")
    assert_same(other, model)


def test_example_3_checkpoints(smp_init):
    # Training with MirroredStrategy and Checkpointing
    strategy = two_replicas()
    checkpoint_dir = "./training_checkpoints"
    checkpoint_prefix = os.path.join(checkpoint_dir, "ckpt_{epoch}")

    with strategy.scope():
        model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(10)])
        model.compile("adam", "mse")
        checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
        # restore(None) is refused now.
        latest = tf.train.latest_checkpoint(checkpoint_dir)
        if latest:
            checkpoint.restore(latest)  # Restore a previous checkpoint if exists
        model.fit(
            X,
            Y,
            batch_size=8,
            verbose=0,
            callbacks=[
                # Keras 3 wants this ending, and it writes no TensorFlow checkpoint.
                tf.keras.callbacks.ModelCheckpoint(
                    filepath=checkpoint_prefix + ".weights.h5", save_weights_only=True
                )
            ],
        )
        checkpoint.save(os.path.join(checkpoint_dir, "ckpt"))

    def make():
        made = keras.Sequential([keras.Input((5,)), keras.layers.Dense(10)])
        made.compile("adam", "mse")
        return made

    # Loading from checkpoint: "must use the same strategy", but it need not be.
    # A checkpoint has no architecture: load_model needs the model, or a function that makes it.
    latest = tf.train.latest_checkpoint(checkpoint_dir)
    with strategy.scope():
        assert_same(smp.load_model(latest, make), model)
    assert_same(smp.load_model(latest, make), model)
    assert_same(smp.load_model(checkpoint_dir + "/ckpt_1.weights.h5", make), model)
    smp_init({"partitions": 2})
    split = smp.load_model(latest, make)
    assert_same(split, model)
    np.testing.assert_allclose(
        split(X), X @ model.get_weights()[0] + model.get_weights()[1], rtol=1e-4, atol=1e-5
    )
