"""What a user does to a model between two calls of `fit`."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from training.fixtures import BY_TWO, assert_same, classifier, data
from turns import turn

import opensmp as smp


@pytest.fixture(autouse=True)
def _two_partitions(smp_init):
    smp_init(BY_TWO)


def three_layers() -> keras.Model:
    keras.utils.set_random_seed(1)
    inputs = keras.Input((6,))
    x = keras.layers.Dense(8, activation="tanh", name="hidden")(inputs)
    x = keras.layers.BatchNormalization(name="norm")(x)
    return keras.Model(inputs, keras.layers.Dense(4, activation="softmax", name="top")(x))


def fit(model: keras.Model, x, y) -> dict:
    model.compile("adam", "sparse_categorical_crossentropy")
    return model.fit(x, y, batch_size=8, epochs=2, verbose=0).history


def test_lora_before_the_first_fit_and_in_another_layer_after_it():
    x, y = data(16)

    def use(model):
        model.get_layer("hidden").enable_lora(2)
        histories = [fit(model, x, y)]
        model.get_layer("top").enable_lora(2, lora_alpha=3.0)
        histories.append(fit(model, x, y))
        trained = [v.path.rpartition("/")[2] for v in model.trainable_variables]
        assert trained.count("lora_kernel_a") == 2
        assert "kernel" not in trained
        return histories, model.predict(x, verbose=0)

    assert_same(classifier, use)


def test_lora_weights_lie_where_their_kernel_does():
    x, y = data(16)
    model = smp.DistributedModel.from_keras(classifier())
    fit(model, x, y)
    for name in ("hidden", "top"):
        model.get_layer(name).enable_lora(2)
    fit(model, x, y)
    homes = []
    for name in ("hidden", "top"):
        devices = {v.value.device for v in model.get_layer(name).variables}
        assert len(devices) == 1
        homes += devices
    assert len(set(homes)) == 2


def test_lora_of_embeddings_and_einsum_layers():
    x = np.random.default_rng(0).integers(0, 9, (16, 5))
    y = np.random.default_rng(1).integers(0, 4, 16)

    def make():
        keras.utils.set_random_seed(1)
        inputs = keras.Input((5,), dtype="int32")
        h = keras.layers.Embedding(9, 4, name="table")(inputs)
        h = keras.layers.EinsumDense("abc,cd->abd", (None, 6), bias_axes="d", name="mixed")(h)
        h = keras.layers.GlobalAveragePooling1D()(h)
        return keras.Model(inputs, keras.layers.Dense(4, activation="softmax")(h))

    def use(model):
        histories = [fit(model, x, y)]
        for name in ("table", "mixed"):
            model.get_layer(name).enable_lora(2)
        return [*histories, fit(model, x, y)]

    assert_same(make, use)


@turn(0, of=2)
def test_freezing_and_unfreezing_of_layers_with_state(smp_init):
    """With BatchNormalization frozen its statistics stay, and with the first layer its slots go."""
    smp_init({**BY_TWO, "microbatches": 1})  # BatchNormalization sees microbatches
    x, y = data(16)

    def use(model):
        found = []
        for frozen in (["hidden", "norm"], ["norm"], [], ["top"]):
            for layer in model.layers:
                layer.trainable = layer.name not in frozen
            found.append(fit(model, x, y))
            found.append(model.get_layer("norm").moving_mean.numpy())
            found.append(len(model.optimizer.variables))
        return found

    assert_same(three_layers, use)


def test_a_layer_frozen_without_compiling_again_is_treated_as_keras_does():
    x, y = data(16)

    def use(model):
        fit(model, x, y)
        model.get_layer("hidden").trainable = False
        model.fit(x, y, batch_size=8, verbose=0)
        return model.get_layer("hidden").kernel.numpy()

    assert_same(classifier, use)


def test_weights_are_read_and_written_between_fits():
    x, y = data(16)

    def use(model):
        first = model.get_weights()
        fit(model, x, y)
        assert not np.array_equal(first[0], model.get_weights()[0])
        model.set_weights(first)
        for before, after in zip(first, model.get_weights(), strict=True):
            np.testing.assert_array_equal(before, after)
        model.get_layer("top").set_weights([w * 2 for w in model.get_layer("top").get_weights()])
        return fit(model, x, y)

    assert_same(classifier, use)


@turn(1, of=2)
def test_what_a_model_tells_of_itself_is_that_of_the_plain_one():
    x, y = data(16)

    def use(model):
        told = []
        for _ in range(2):
            told.append(
                [
                    model.count_params(),
                    [layer.name for layer in model.layers][1:],
                    [len(weights) for weights in (model.weights, model.trainable_weights)],
                    model.get_layer(index=1).name,
                    model.get_layer("top").count_params(),
                    model.input_shape,
                    model.output_shape,
                    [v.path for v in model.variables][:2],
                ]
            )
            fit(model, x, y)
        return told

    plain = use(three_layers())
    ours = use(smp.DistributedModel.from_keras(three_layers()))
    assert ours == plain
