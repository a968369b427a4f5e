"""Files in tests/saving/old were written by tf_keras 2.21, with what it computed from them."""

from __future__ import annotations

import pathlib

import h5py
import keras
import numpy as np
import pytest
from saving.sample_models import X, Y, functional, same

from opensmp.saving.models.keras2.hdf5 import cudnn_weight, load_hdf5

OLD = pathlib.Path(__file__).parent / "old"


def load(path, **options):
    given = {"compile": True, "custom_objects": None, "safe_mode": True, **options}
    return load_hdf5(path, "smp.load_model", **given)


@pytest.mark.parametrize("name", ["recurrent", "nested", "cudnn"])
def test_keras_3_refuses_what_keras_2_wrote_and_we_open_it_with_its_numbers(name):
    with pytest.raises((ValueError, TypeError)):
        keras.saving.load_model(OLD / f"{name}.h5", compile=False)
    data = np.load(OLD / f"{name}.npz")
    model = load(OLD / f"{name}.h5")
    np.testing.assert_allclose(model(data["x"]), data["p"], rtol=1e-5, atol=1e-6)


def test_training_goes_on_where_keras_2_stopped():
    # LSTM with Keras 2's hard_sigmoid, GRU without reset_after, Adam(decay=0.1) with its moments.
    data = np.load(OLD / "recurrent.npz")
    model = load(OLD / "recurrent.h5")
    assert int(model.optimizer.iterations) == 4
    assert isinstance(
        keras.optimizers.schedules.deserialize(model.optimizer.get_config()["learning_rate"]),
        keras.optimizers.schedules.InverseTimeDecay,
    )
    model.fit(data["x"], data["y"], batch_size=4, shuffle=False, verbose=0)
    np.testing.assert_allclose(model(data["x"]), data["after"], rtol=1e-4, atol=1e-6)


def test_a_nested_model_with_one_output_gives_a_tensor():
    model = load(OLD / "nested.h5")
    assert type(model.optimizer) is keras.optimizers.Adam
    assert not isinstance(model.layers[0](np.zeros((1, 6, 6, 2), "float32")), list)


def test_compiled_files_of_keras_3_come_back_with_their_optimizer(tmp_path):
    model = functional()
    model.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    model.save(tmp_path / "model.h5")
    with pytest.raises(ValueError, match="Could not deserialize"):
        keras.saving.load_model(tmp_path / "model.h5")
    loaded = load(tmp_path / "model.h5")
    same(loaded.weights, model.weights)
    same(loaded.optimizer.variables, model.optimizer.variables)
    assert loaded.loss == "mse"
    assert loaded.get_compile_config()["metrics"] == ["mae"]
    assert not load(tmp_path / "model.h5", compile=False).compiled


def test_state_that_does_not_fit_is_left_out_with_a_warning(tmp_path):
    model = functional()
    model.fit(X, Y, batch_size=8, verbose=0)
    model.save(tmp_path / "model.h5")
    with h5py.File(tmp_path / "model.h5", "r+") as file:
        names = list(file["optimizer_weights"].attrs["weight_names"])
        file["optimizer_weights"].attrs["weight_names"] = names[:-1]
    with pytest.warns(UserWarning, match=r"state of the optimizer .* 13 arrays, does not fit Adam"):
        loaded = load(tmp_path / "model.h5")
    same(loaded.weights, model.weights)


def test_a_lambda_layer_needs_consent_in_the_words_of_keras(tmp_path):
    inputs = keras.Input((5,))
    outputs = keras.layers.Lambda(lambda x: x * 2, output_shape=(5,))(inputs)
    keras.Model(inputs, outputs).save(tmp_path / "model.h5")
    with pytest.raises(ValueError, match=r"(?s)Lambda.*unsafe deserialization|safe_mode=False"):
        load(tmp_path / "model.h5")
    loaded = load(tmp_path / "model.h5", safe_mode=False)
    np.testing.assert_array_equal(loaded(X), X * 2)


class TestCudnnWeight:
    def test_both_biases_of_an_lstm_are_added(self):
        bias = np.arange(16.0)
        np.testing.assert_array_equal(cudnn_weight(bias, "bias", "LSTM"), bias[:8] + bias[8:])

    def test_both_biases_of_a_gru_stay(self):
        assert cudnn_weight(np.arange(12.0), "bias", "GRU").shape == (2, 6)

    def test_recurrent_kernels_are_transposed_gate_by_gate(self):
        value = np.arange(16.0).reshape(2, 8)
        found = cudnn_weight(value, "recurrent_kernel", "LSTM")
        np.testing.assert_array_equal(found[:, 2:4], value[:, 2:4].T)


def test_a_model_that_was_compiled_and_never_trained_begins_anew_without_a_warning(tmp_path):
    model = functional()
    model.optimizer.learning_rate = 0.25
    model.save(tmp_path / "model.h5")
    loaded = load(tmp_path / "model.h5")  # warnings are errors here
    assert int(loaded.optimizer.iterations) == 0
    assert float(loaded.optimizer.learning_rate) == 0.25
    for each in (model, loaded):
        each.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    same(loaded.weights, model.weights)
