from __future__ import annotations

import numpy as np
import pytest

from opensmp.errors import SavingError
from opensmp.saving.models.keras2.layer_configs import keras2_hard_sigmoid, upgraded


def layer(kind, **config):
    return {"class_name": kind, "config": {"name": "it", **config}}


def config_of(kind, **config):
    return upgraded(layer(kind, **config), "load").config["config"]


def test_what_keras_3_knows_is_left_alone():
    dense = layer("Dense", units=3, activation="relu")
    found = upgraded(dense, "load")
    assert found.config == dense
    assert not found.changed
    assert found.config is not dense


@pytest.mark.parametrize(
    ("kind", "argument", "value"),
    [
        ("LSTM", "time_major", False),
        ("Dense", "dynamic", False),
        ("BatchNormalization", "renorm", False),
        ("BatchNormalization", "virtual_batch_size", None),
        ("Embedding", "input_length", 7),
        ("DepthwiseConv2D", "groups", 1),
        ("DepthwiseConv2D", "kernel_initializer", {"class_name": "Zeros", "config": {}}),
        ("Conv2D", "an_argument_of_the_past", None),
    ],
)
def test_arguments_that_say_nothing_are_dropped(kind, argument, value):
    assert argument not in config_of(kind, **{argument: value})


def test_arguments_that_say_something_are_never_dropped_and_all_are_named():
    model = {
        "class_name": "Sequential",
        "config": {
            "layers": [
                layer("LSTM", units=2, time_major=True),
                layer("BatchNormalization", renorm=True),
                layer("TFOpLambda", function="math.add"),
            ]
        },
    }
    with pytest.raises(
        SavingError, match=r"(?s)time_major=True.*renorm=True.*'math.add'.*load_model\(path, model"
    ):
        upgraded(model, "load")


def test_a_gru_that_did_not_know_reset_after_has_none():
    assert config_of("GRU", units=3)["reset_after"] is False
    assert config_of("GRU", units=3, reset_after=True)["reset_after"] is True


def test_a_cudnn_layer_becomes_the_layer_that_computes_the_same():
    found = upgraded(layer("CuDNNGRU", units=3), "load")
    assert found.config["class_name"] == "GRU"
    assert found.config["config"]["reset_after"] is True
    assert found.config["config"]["recurrent_activation"] == "sigmoid"
    assert found.cudnn == {"it": "GRU"}


def test_an_axis_in_a_list_becomes_a_number():
    assert config_of("BatchNormalization", axis=[3])["axis"] == 3


def test_policies_become_their_names():
    policy = {"class_name": "Policy", "config": {"name": "mixed_float16"}}
    assert config_of("Dense", units=1, dtype=policy)["dtype"] == "mixed_float16"


def test_hard_sigmoid_has_the_slope_of_keras_2():
    assert config_of("LSTM", recurrent_activation="hard_sigmoid")["recurrent_activation"][
        "registered_name"
    ].endswith("keras2_hard_sigmoid")
    x = np.array([-3.0, -1.0, 0.0, 1.0, 3.0], "float32")
    np.testing.assert_allclose(keras2_hard_sigmoid(x), [0, 0.3, 0.5, 0.7, 1], rtol=1e-6)
