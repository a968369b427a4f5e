"""What is compared of a model and a call, and what a difference is told as."""

from __future__ import annotations

import keras
import pytest

from opensmp.training.sync.fit_settings import (
    ONE_AHEAD,
    difference,
    different,
    digests,
    settings_of,
    settings_of_optimizer,
)


def compiled(units=2, rate=0.1):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(units)])
    model.compile(keras.optimizers.SGD(rate), "mse", metrics=["mae"])
    return model


def names_that_differ(*found):
    return different([digests(each) for each in found])


@pytest.mark.parametrize("call", ["fit", "evaluate", "predict", "train_on_batch"])
def test_equal_models_have_equal_settings(call):
    arguments = None if call.endswith("batch") else {}
    first, second = (settings_of(compiled(), call, arguments) for _ in range(2))
    assert first == second
    assert names_that_differ(first, second) == []


def test_a_default_is_the_same_as_its_value():
    model = compiled()
    given = settings_of(model, "fit", {"epochs": 1, "batch_size": None, "callbacks": [print]})
    assert given == settings_of(model, "fit", {"verbose": 0})
    assert names_that_differ(given, settings_of(model, "fit", {"epochs": 2})) == ["epochs"]


def test_the_learning_rate_is_that_of_now_and_counts_in_training():
    first, second = compiled(), compiled()
    second.optimizer.learning_rate = 0.2
    rate = ["the optimizer's learning_rate"]
    assert names_that_differ(settings_of(first, "fit", {}), settings_of(second, "fit", {})) == rate
    assert names_that_differ(*map(settings_of_optimizer, (first, second))) == rate
    assert settings_of(first, "evaluate", {}) == settings_of(second, "evaluate", {})


def test_layers_of_another_size_and_frozen_ones_are_found():
    frozen = compiled()
    frozen.layers[0].trainable = False
    plain = settings_of(compiled(), "predict", {})
    assert names_that_differ(plain, settings_of(compiled(3), "predict", {})) == [
        "the layers",
        "the weights",
    ]
    assert "the weights" in names_that_differ(plain, settings_of(frozen, "predict", {}))


def test_a_model_that_is_not_built_in_one_process_is_no_difference():
    unbuilt = keras.Sequential([keras.layers.Dense(2)])
    found = settings_of(unbuilt, "predict", {})
    assert found["the weights"] is None
    assert names_that_differ(found, settings_of(compiled(), "predict", {})) == []


def test_another_optimizer_is_one_difference():
    first = {"the optimizer": "SGD", "the optimizer's momentum": "0.0"}
    second = {"the optimizer": "Adam", "the optimizer's beta_1": "0.9"}
    assert names_that_differ(first, second) == ["the optimizer"]


def test_a_difference_names_the_ranks_of_each_value():
    found = [{"loss": text} for text in ("'mse'", "'mae'", "'mse'")] + [{}]
    text = difference(["loss"], found)
    assert "    loss: 'mse' in ranks 0, 2; 'mae' in rank 1; not given in rank 3\n" in text
    assert text.endswith(ONE_AHEAD)


def test_of_long_texts_the_place_that_differs_is_shown():
    texts = ["x" * 5000 + end + "y" * 5000 for end in ("1", "2")]
    text = difference(["loss"], [{"loss": each} for each in texts])
    assert all(each in text for each in ("x1y", "x2y"))
    assert len(text) < 1200
    lines = ["a\nb\nc", "a\nB\nc\nd"]
    text = difference(["the layers"], [{"the layers": each} for each in lines])
    assert "the layers, number 2: b in rank 0; B in rank 1" in text
