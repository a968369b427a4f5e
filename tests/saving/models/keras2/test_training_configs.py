from __future__ import annotations

import keras
import numpy as np
import pytest

from opensmp.saving.models.keras2.training_configs import compile_arguments, optimizer_values


def arguments(optimizer="Adam", settings=None, **rest):
    config = {"optimizer_config": {"class_name": optimizer, "config": settings or {}}, **rest}
    return compile_arguments(config)


def test_lr_is_the_learning_rate():
    optimizer = arguments(settings={"lr": 0.25, "beta_1": 0.5, "epsilon": None})["optimizer"]
    assert float(optimizer.learning_rate) == 0.25
    assert optimizer.beta_1 == 0.5
    assert optimizer.epsilon == 1e-7


def test_decay_is_a_schedule_with_the_same_rates():
    optimizer = arguments("SGD", {"lr": 0.1, "decay": 0.5})["optimizer"]
    rates = []
    for step in range(3):
        optimizer.iterations.assign(step)
        rates.append(float(optimizer.learning_rate))
    np.testing.assert_allclose(rates, [0.1 / (1 + 0.5 * step) for step in range(3)], rtol=1e-6)


def test_an_argument_that_is_unknown_is_left_out_with_a_warning():
    with pytest.warns(UserWarning, match=r"Adam has arguments .* \{'rocket': 3\}"):
        arguments(settings={"learning_rate": 0.1, "rocket": 3})


def test_losses_and_metrics_of_keras_2():
    wrapped = {"class_name": "MeanMetricWrapper", "config": {"name": "accuracy", "fn": "whatever"}}
    loss = {
        "class_name": "CategoricalCrossentropy",
        "config": {"reduction": "auto", "name": "x", "from_logits": True, "fn": "y"},
    }
    found = arguments(loss=loss, metrics=[[wrapped, "mae"]], loss_weights=None)
    assert isinstance(found["loss"], keras.losses.CategoricalCrossentropy)
    assert found["loss"].get_config()["from_logits"]
    assert found["metrics"] == [["accuracy", "mae"]]
    assert "loss_weights" not in found


def test_moments_of_keras_2_are_put_in_the_order_of_keras_3():
    trained = [keras.Variable(np.zeros((2,))), keras.Variable(np.zeros((3,)))]
    optimizer = keras.optimizers.Adam()
    optimizer.build(trained)
    shapes = [(), (2,), (3,), (2,), (3,)]  # iterations, all first moments, all second ones
    saved = [(str(i), np.full(shape, i)) for i, shape in enumerate(shapes)]
    values = optimizer_values(saved, optimizer.variables, trained)
    assert [None if v is None else float(np.max(v)) for v in values] == [0, None, 1, 3, 2, 4]
    assert optimizer_values(saved[:-1], optimizer.variables, trained) is None
