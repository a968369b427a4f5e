from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from saving.sample_models import X, Y, functional, same

import opensmp as smp
from opensmp.errors import SavingError


@pytest.fixture
def exported(tmp_path):
    model = functional()
    model.fit(X, Y, batch_size=8, verbose=0)
    model.export(tmp_path / "served", verbose=False)
    return model, tmp_path / "served"


def test_the_layer_computes_what_was_saved_and_has_its_weights(exported):
    model, path = exported
    layer = smp.SavedModelLayer(path)
    np.testing.assert_allclose(layer(X), model(X), rtol=1e-6, atol=1e-6)
    by_value = sorted(np.asarray(v).tobytes() for v in layer.weights)
    assert by_value == sorted(np.asarray(v).tobytes() for v in model.weights)
    assert sorted(tuple(v.shape) for v in layer.non_trainable_weights) == [(4,), (4,)]  # statistics


def test_it_trains_as_the_model_does_in_inference_mode(exported):
    model, path = exported
    layer = smp.SavedModelLayer(path)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((model(X) - Y) ** 2)
    expected = tape.gradient(loss, model.trainable_weights)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((layer(X) - Y) ** 2)
    found = tape.gradient(loss, layer.trainable_weights)
    norms = [sorted(float(tf.norm(g)) for g in each) for each in (expected, found)]
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-5)


def test_it_is_partitioned_inside(smp_init, exported):
    model, path = exported
    smp_init({"partitions": 2, "microbatches": 2})
    inputs = keras.Input((5,))
    split = smp.DistributedModel(inputs, smp.SavedModelLayer(path)(inputs))
    np.testing.assert_allclose(split(X), model(X), rtol=1e-5, atol=1e-6)
    devices = {v.value.device for v in split.layers[1].weights}
    assert len(devices) == 2
    split.compile("sgd", "mse")
    plain = keras.Sequential([keras.Input((5,)), smp.SavedModelLayer(path)])
    plain.compile("sgd", "mse")
    for each in (split, plain):
        each.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    for a, b in zip(split.weights, plain.weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_file_that_names_a_saved_model_needs_consent(exported, tmp_path):
    _, path = exported
    model = keras.Sequential([keras.Input((5,)), smp.SavedModelLayer(path)])
    model.save(tmp_path / "model.keras")
    with pytest.raises(Exception, match=r"safe_mode=False"):
        smp.load_model(tmp_path / "model.keras")
    loaded = smp.load_model(tmp_path / "model.keras", safe_mode=False)
    same(loaded.weights, model.weights)


def test_several_inputs_and_outputs_go_by_name(tmp_path):
    a, b = keras.Input((2,), name="a"), keras.Input((2,), name="b")
    model = keras.Model({"a": a, "b": b}, {"sum": a + b, "product": a * b})
    model.export(tmp_path / "served", verbose=False)
    layer = smp.SavedModelLayer(tmp_path / "served")
    found = layer({"a": tf.fill([1, 2], 2.0), "b": tf.fill([1, 2], 3.0)})
    assert {name: float(x[0, 0]) for name, x in found.items()} == {"sum": 5.0, "product": 6.0}
    with pytest.raises(SavingError, match=r"expected the inputs \['a', 'b'\], received \['a'\]"):
        layer({"a": tf.ones([1, 2])})


def test_what_cannot_be_read_says_so(exported, tmp_path):
    _, path = exported
    with pytest.raises(SavingError, match=r"no signature 'train'; it has .*'serving_default'"):
        smp.SavedModelLayer(path, "train")
    with pytest.raises(SavingError, match="is not the directory of a SavedModel"):
        smp.SavedModelLayer(tmp_path)
    (path / "saved_model.pb").write_bytes((path / "saved_model.pb").read_bytes()[:500])
    with pytest.raises(SavingError, match="cannot be read, or is half written"):
        smp.SavedModelLayer(path)
