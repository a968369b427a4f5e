"""Functional models with operations among their layers, in `.h5` files: Keras loads none."""

from __future__ import annotations

import copy
import json

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import opensmp as smp
from opensmp.errors import SavingError
from opensmp.saving.models.keras2.operation_nodes import name_operations


def series(dtype="float32"):
    return keras.Input((4, 3) if dtype == "float32" else (4,), dtype=dtype)


def masking():
    x = series()
    return keras.Model(x, layers.Dense(2)(layers.LSTM(3)(layers.Masking()(x))))


def embedding():
    x = series("int32")
    return keras.Model(x, layers.LSTM(3)(layers.Embedding(7, 3, mask_zero=True)(x)))


def attention():
    x = series("int32")
    e = layers.Embedding(7, 4, mask_zero=True)(x)
    attended = layers.MultiHeadAttention(2, 2)(e, e)
    return keras.Model(x, layers.GlobalAveragePooling1D()(attended))


def bidirectional():
    x = series()
    return keras.Model(x, layers.Bidirectional(layers.GRU(3))(layers.Masking(1.0)(x)))


def distributed_over_time():
    x = series()
    return keras.Model(x, layers.TimeDistributed(layers.Dense(2))(layers.Masking()(x)))


def nested():
    x = series()
    return keras.Model(x, layers.Dense(2)(masking()(x)))


def twelve_masks():
    x = series()
    ends = [layers.LSTM(2)(layers.Masking(float(value))(x)) for value in range(12)]
    return keras.Model(x, layers.Add()(ends))


def arithmetic():
    x, y = keras.Input((4,)), keras.Input((4,))
    return keras.Model([x, y], layers.Dense(2)(-(x + y * 2.0 - 1) / 3 + np.ones(4, "float32")))


def slices():
    x = series()
    return keras.Model(
        x, layers.Dense(2)(x[:, 0]) + layers.Dense(2)(x[:, 1:-1:2, ..., None][:, 0, 0])
    )


def ellipses():
    x = series()
    return keras.Model(x, [x[..., 0], x[0, ...], x[:, ..., None, 1], x[1:, 2, ..., 0]])


def functions():
    x = series()
    joined = ops.concatenate([ops.mean(x, axis=1), ops.max(x, axis=(1,))], axis=-1)
    dense = layers.Dense(4)(ops.softmax(ops.relu(ops.cast(joined, "float32"))))
    return keras.Model(x, ops.reshape(dense, (-1, 2, 2)))


def products():
    x = series()
    return keras.Model(x, ops.einsum("bij,bkj->bik", x, x) + x @ ops.transpose(x, (0, 2, 1)))


def choices():
    x = series()
    return keras.Model(x, ops.where((x > 0) & (x < 2), x, ops.zeros_like(x)))


def same_names_as_layers():
    x, y = keras.Input((4,)), keras.Input((4,))
    as_layers = layers.Add()([x, y]), layers.Maximum()([x, y]), layers.Softmax()(x)
    as_operations = ops.add(x, y), ops.maximum(x, y), ops.softmax(x)
    return keras.Model([x, y], layers.Concatenate()([*as_layers, *as_operations]))


MODELS = [
    masking,
    embedding,
    attention,
    bidirectional,
    distributed_over_time,
    nested,
    twelve_masks,
    arithmetic,
    slices,
    ellipses,
    functions,
    products,
    choices,
    same_names_as_layers,
]


def inputs_of(model):
    random = np.random.default_rng(0)
    arrays = [random.integers(0, 3, (2, *x.shape[1:])).astype(x.dtype) for x in model.inputs]
    return arrays if len(arrays) > 1 else arrays[0]


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_the_model_computes_the_same_after_ten_files(make, tmp_path):
    keras.utils.set_random_seed(1)
    model = make()
    x = inputs_of(model)
    expected = tf.nest.map_structure(np.asarray, model(x))
    model.save(tmp_path / "0.h5")
    with pytest.raises((ValueError, TypeError)):  # the day Keras reads them, this module can go
        keras.saving.load_model(tmp_path / "0.h5", compile=False)
    for number in range(10 if make in (masking, slices) else 2):
        loaded = smp.load_model(tmp_path / f"{number}.h5")
        tf.nest.map_structure(np.testing.assert_array_equal, loaded(x), expected)
        loaded.save(tmp_path / f"{number + 1}.h5")


def test_masks_count_in_what_is_computed_and_in_training(tmp_path):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((None, 3))
    model = keras.Model(inputs, layers.Dense(2)(layers.LSTM(3)(layers.Masking()(inputs))))
    model.compile("adam", "mse")
    model.save(tmp_path / "model.h5")
    x = np.random.default_rng(0).normal(size=(4, 4, 3)).astype("float32")
    x[:, 2:] = 0
    y = np.ones((4, 2), "float32")
    loaded = smp.load_model(tmp_path / "model.h5")
    np.testing.assert_allclose(loaded(x), model(x[:, :2]), rtol=1e-6)
    for each in (model, loaded):
        each.fit(x, y, epochs=3, batch_size=4, shuffle=False, verbose=0)
    for a, b in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_it_is_split_over_partitions_as_any_other(smp_init, tmp_path):
    keras.utils.set_random_seed(1)
    model = masking()
    model.save(tmp_path / "model.h5")
    x = inputs_of(model)
    smp_init({"partitions": 2, "microbatches": 2})
    loaded = smp.load_model(tmp_path / "model.h5")
    np.testing.assert_allclose(loaded(x), model(x), rtol=1e-6)
    loaded.save(tmp_path / "again.h5")
    again = smp.load_model(tmp_path / "again.h5", distribute=False)
    np.testing.assert_array_equal(np.asarray(again(x)), np.asarray(model(x)))


def config_of(make, path):
    make().save(path)
    with h5py.File(path) as file:
        return json.loads(file.attrs["model_config"])


def test_what_has_no_operations_is_left_as_it_is(tmp_path):
    x = keras.Input((4,))
    config = config_of(
        lambda: keras.Model(x, layers.Add()([x, layers.ReLU()(x)])), tmp_path / "a.h5"
    )
    before = copy.deepcopy(config)
    assert not name_operations(config)
    assert config == before


def test_names_that_the_user_gives_come_first(tmp_path):
    config = config_of(masking, tmp_path / "a.h5")
    assert not name_operations(copy.deepcopy(config), custom={"NotEqual", "Any"})
    assert name_operations(config)


@pytest.mark.parametrize("name", ["system", "Map", "Function", "Operation", "LoadLibrary"])
def test_a_file_names_operations_of_keras_and_no_other_python(tmp_path, name):
    path = tmp_path / "a.h5"
    config = config_of(masking, path)
    for layer in config["config"]["layers"]:
        if layer["class_name"] == "NotEqual":
            layer["class_name"] = name
    with h5py.File(path, "r+") as file:
        file.attrs["model_config"] = json.dumps(config)
    with pytest.raises(SavingError):
        smp.load_model(path)


def test_safe_mode_holds_for_the_arguments_of_operations(tmp_path):
    path = tmp_path / "a.h5"
    config = config_of(masking, path)
    for layer in config["config"]["layers"]:
        if layer["class_name"] == "NotEqual":
            layer["inbound_nodes"][0]["args"][1] = {
                "class_name": "__lambda__",
                "config": {"value": "4wAAAAA=", "defaults": None, "closure": None},
            }
    with h5py.File(path, "r+") as file:
        file.attrs["model_config"] = json.dumps(config)
    with pytest.raises(SavingError, match=r"deserialization of a Python lambda"):
        smp.load_model(path)
