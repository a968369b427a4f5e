"""The five methods of "Integrating Keras Models as Layers in Your Neural Networks".

Each is written as in the seed, but that pictures are of 16 x 16 and not of 224 x 224 points, and
that an example which lacks an import or the rest of a model has it here.
"""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras.layers import Dense, Input, Lambda
from keras.models import Model, Sequential

import opensmp as smp

X = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype("float32")
Y = np.array([[0.0], [1.0], [1.0], [0.0]], "float32")


def pretrained():
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = Sequential(
        [
            Input((16, 16, 3)),
            layers.Conv2D(8, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.Conv2D(8, 3, strides=2, activation="relu"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(32, activation="relu"),
            layers.Dense(8),
        ]
    )
    keras.utils.set_random_seed(1)
    return Model(model.inputs, model.outputs[0])


def method_1(pretrained_model):
    # Assume 'pretrained_model' is a pre-trained Keras model
    input_tensor = Input(shape=(16, 16, 3))  # This shape will vary according to your dataset
    x = pretrained_model(input_tensor)
    output_tensor = Dense(1, activation="sigmoid")(x)

    new_model = Model(inputs=input_tensor, outputs=output_tensor)
    return new_model


class CustomModel(Model):
    def __init__(self, pretrained_model):
        super(CustomModel, self).__init__()  # noqa: UP008
        self.pretrained_model = pretrained_model
        self.dense_layer = Dense(1, activation="sigmoid")

    def call(self, inputs):
        x = self.pretrained_model(inputs)
        return self.dense_layer(x)


def method_2(pretrained_model):
    # Instantiate the new model
    new_custom_model = CustomModel(pretrained_model)
    return new_custom_model


def method_3(pretrained_model):
    # Assume 'pretrained_model' is a pre-trained model we want to use as a layer
    new_model = Sequential([pretrained_model, Dense(1, activation="sigmoid")])
    return new_model


def method_4(pretrained_model):
    # Freeze the whole pre-trained model
    pretrained_model.trainable = False

    # Continue building the model as usual
    inputs = pretrained_model.input
    x = pretrained_model(inputs)
    outputs = Dense(1, activation="sigmoid")(x)
    new_model = Model(inputs=inputs, outputs=outputs)
    return new_model


def method_5(pretrained_model):
    # Wrapping the pre-trained model in a Lambda layer
    model_as_lambda = Lambda(lambda x: pretrained_model(x), output_shape=(8,))

    # Now 'model_as_lambda' acts like any other layer
    return Sequential([Input((16, 16, 3)), model_as_lambda, Dense(1, activation="sigmoid")])


@pytest.mark.parametrize("method", [method_1, method_2, method_3, method_4, method_5])
def test_the_model_is_split_and_trains_as_the_plain_one(smp_init, method):
    smp_init({"partitions": 2})
    found = []
    for wrap in (smp.DistributedModel.from_keras, lambda model: model):
        model = wrap(method(pretrained()))
        model(X)
        model.compile(keras.optimizers.SGD(0.1), "binary_crossentropy")
        model.fit(X, Y, batch_size=4, epochs=2, verbose=0)
        found.append((model, np.asarray(model(X))))
    (split, outputs), (plain, expected) = found
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-6)
    for one, other in zip(split.weights, plain.weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    head = 4 * (8 + 1)
    assert all(row.parameter_bytes > head for row in split.plan.rows)  # cut inside
