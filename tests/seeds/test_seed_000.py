"""The three examples of "How can I create a smp.DistributedModel that utilizes pre-trained models".

`smp` is hypothetical there, and has no `smp.init`; ours has. What is trained is compared with the
same classes on `keras.Model`.
"""

from __future__ import annotations

import types

import keras
import numpy as np
import pytest
import tensorflow as tf

import smp

TWO = {"partitions": 2, "microbatches": 2}
PLAIN = types.SimpleNamespace(DistributedModel=keras.Model)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """`pretrained_model.h5` in the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(layers):
        keras.utils.set_random_seed(0)
        keras.Sequential(layers).save("pretrained_model.h5")

    return write


def alike(make, x, y, epochs=2):
    """Trains what `make(smp)` gives, distributed and plain; their weights are the same."""
    models = []
    for face in (smp, PLAIN):
        keras.utils.set_random_seed(1)
        model = make(face)
        model(x)
        model.compile(keras.optimizers.SGD(0.1), "mse")
        model.fit(x, y, batch_size=len(x), epochs=epochs, verbose=0)
        models.append(model)
    for one, other in zip(*(model.weights for model in models), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    return models[0]


def test_example_1_feature_extraction_and_linear_regression(smp_init, files):
    smp_init(TWO)
    layers = keras.layers
    files([keras.Input((6,)), layers.Dense(8, "tanh"), layers.BatchNormalization()])

    def make(smp):
        # Load pre-trained Keras model (replace with your actual loading)
        pretrained_model = tf.keras.models.load_model("pretrained_model.h5")
        pretrained_model.trainable = False  # Freeze pre-trained weights

        class DistributedModel(smp.DistributedModel):
            def __init__(self, pretrained_model):
                super().__init__()
                self.pretrained_model = pretrained_model
                self.dense = tf.keras.layers.Dense(1)  # Trainable output layer

            def call(self, inputs):
                features = self.pretrained_model(inputs)
                output = self.dense(features)
                return output

        return DistributedModel(pretrained_model)

    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 6)).astype("float32")
    model = alike(make, x, rng.normal(size=(8, 1)).astype("float32"))
    assert len(model.trainable_weights) == 2


def test_example_2_a_pre_trained_cnn_with_a_distributed_mlp(smp_init):
    smp_init({"partitions": 2})

    # weights="imagenet" would be fetched; pictures of 32 x 32 instead of 224 x 224.
    pretrained_model = tf.keras.applications.ResNet50(
        weights=None, include_top=False, pooling="avg", input_shape=(32, 32, 3)
    )
    pretrained_model.trainable = False

    class DistributedClassifier(smp.DistributedModel):
        def __init__(self, pretrained_model, num_classes):
            super().__init__()
            self.pretrained_model = pretrained_model
            self.mlp = tf.keras.Sequential(
                [
                    tf.keras.layers.Dense(256, activation="relu"),
                    tf.keras.layers.Dropout(0.5),
                    tf.keras.layers.Dense(num_classes, activation="softmax"),
                ]
            )

        def call(self, inputs):
            features = self.pretrained_model(inputs)
            features = tf.reshape(features, (-1, 2048))  # Reshape to fit MLP input
            output = self.mlp(features)
            return output

    # Example Usage
    num_classes = 10
    model = DistributedClassifier(pretrained_model, num_classes)
    # Simulate input data for testing
    dummy_input = np.random.rand(4, 32, 32, 3)
    output = model(dummy_input)
    assert output.shape == (4, 10)

    np.testing.assert_allclose(
        output, model.mlp(pretrained_model(dummy_input)), rtol=1e-4, atol=1e-6
    )
    # Both partitions have a part of ResNet50: it is cut inside.
    devices = {v.value.device for v in pretrained_model.weights}
    assert len(devices) == 2
    before = [np.asarray(v) for v in pretrained_model.weights]
    model.compile("sgd", "sparse_categorical_crossentropy")
    model.fit(dummy_input, np.arange(4), verbose=0)
    assert int(model.optimizer.iterations) == 1
    for value, variable in zip(before, pretrained_model.weights, strict=True):
        np.testing.assert_array_equal(value, variable)


def test_example_3_variable_sized_outputs(smp_init, files):
    smp_init(TWO)
    files([keras.Input((None, 3)), keras.layers.Conv1D(4, 3, padding="same")])

    def make(smp):
        pretrained_model = tf.keras.models.load_model("pretrained_model.h5")
        pretrained_model.trainable = False

        class VariableOutputModel(smp.DistributedModel):
            def __init__(self, pretrained_model):
                super().__init__()
                self.pretrained_model = pretrained_model
                self.lstm = tf.keras.layers.LSTM(64)
                self.dense = tf.keras.layers.Dense(1)

            def call(self, inputs):
                features = self.pretrained_model(inputs)  # variable-length sequence output
                output = self.lstm(features)
                output = self.dense(output)
                return output

        return VariableOutputModel(pretrained_model)

    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 7, 3)).astype("float32")
    model = alike(make, x, np.ones((4, 1), "float32"), epochs=1)
    other_length = rng.normal(size=(4, 3, 3)).astype("float32")
    expected = model.dense(model.lstm(model.pretrained_model(other_length)))
    np.testing.assert_allclose(model(other_length), expected, rtol=1e-5, atol=1e-6)
