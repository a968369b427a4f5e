"""Models of Keras 2 are refused with the lines that take them along."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import opensmp as smp
from opensmp.errors import StepError

OLD = type("Functional", (tf.Module,), {"__module__": "tf_keras.src.engine.functional"})


class OfAUser(OLD):
    """A subclass in a module of one's own."""


@pytest.mark.parametrize("kind", [OLD, OfAUser])
def test_the_message_has_the_lines_that_take_it_along(smp_init, kind):
    smp_init({"partitions": 2})
    with pytest.raises(StepError, match=r"which is of Keras 2 \(tf_keras\)") as error:
        smp.DistributedModel.from_keras(kind())
    lines = str(error.value).splitlines()
    assert '    model = keras.models.load_model("old.h5", compile=False)' in [
        line.partition("  #")[0] for line in lines
    ]


def test_other_objects_have_a_message_of_their_own(smp_init):
    smp_init({"partitions": 2})
    with pytest.raises(StepError, match=r"Wrap a layer in a model") as error:
        smp.DistributedModel.from_keras(keras.layers.Dense(1))
    assert "tf_keras" not in str(error.value)


def test_a_model_taken_along_predicts_the_same_and_trains(smp_init, tmp_path):
    tf_keras = pytest.importorskip("tf_keras")
    smp_init({"partitions": 2, "microbatches": 2})
    inputs = tf_keras.Input((5,))
    hidden = tf_keras.layers.Dense(4, activation="relu")(inputs)
    hidden = tf_keras.layers.BatchNormalization()(hidden)
    old = tf_keras.Model(inputs, tf_keras.layers.Dense(3)(hidden))
    old.compile("adam", "mse")
    x = np.random.default_rng(0).normal(size=(8, 5)).astype("float32")
    old.fit(x, x[:, :3], verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it advises the other format
        old.save(str(tmp_path / "old.h5"))
    model = keras.models.load_model(tmp_path / "old.h5", compile=False)
    np.testing.assert_array_equal(model.predict(x, verbose=0), old.predict(x, verbose=0))
    model = smp.DistributedModel.from_keras(model)
    model.compile("adam", "mse")
    assert np.isfinite(model.fit(x, x[:, :3], verbose=0).history["loss"]).all()
