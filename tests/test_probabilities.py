from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import opensmp as smp

_INPUTS = np.array([[1.0, -1.0], [0.5, 2.0]], "float32")


def _model(activation: str, units: int) -> keras.Model:
    """One layer whose logits are hundreds apart, so that probabilities are 0 and 1."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(units, activation)])
    model.layers[-1].kernel.assign(np.full((2, units), 100.0) * (np.arange(units) - 0.5))
    return model


@pytest.mark.parametrize(
    ("activation", "units", "loss_of", "labels"),
    [
        ("softmax", 3, keras.losses.sparse_categorical_crossentropy, np.array([0, 0])),
        ("sigmoid", 1, keras.losses.binary_crossentropy, np.array([[1.0], [1.0]])),
    ],
)
def test_the_loss_of_probabilities_is_computed_from_their_logits(
    smp_init: Any, activation: str, units: int, loss_of: Any, labels: Any
) -> None:
    smp_init({"partitions": 2, "microbatches": 2})
    plain = _model(activation, units)
    split = smp.DistributedModel.from_keras(_model(activation, units))

    def forward_backward(model: Any, x: Any, y: Any) -> tuple[Any, Any]:
        with tf.GradientTape() as tape:
            loss = loss_of(y, model(x, training=True))
        return loss, tape.gradient(loss, model.trainable_variables[0])

    expected = [
        tf.function(forward_backward)(plain, _INPUTS[m : m + 1], labels[m : m + 1])
        for m in range(2)
    ]
    loss, gradient = smp.step(lambda x, y: forward_backward(split, x, y))(
        tf.constant(_INPUTS), tf.constant(labels)
    )
    for m, (expected_loss, expected_gradient) in enumerate(expected):
        np.testing.assert_array_equal(loss.outputs[m], expected_loss)
        np.testing.assert_array_equal(gradient.outputs[m], expected_gradient)
    # From the probabilities it could not be more than -log(1e-7), with no gradient.
    assert max(np.max(x) for x, _ in expected) > 17
