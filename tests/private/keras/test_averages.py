"""Canaries of averages of weights that others have."""

from __future__ import annotations

import keras
from canaries import elsewhere

from opensmp import _private


def test_averages_of_own():
    optimizer = keras.optimizers.SGD(0.1, use_ema=True)
    kernel, here = elsewhere(), keras.Variable([1.0])
    optimizer.build([kernel, here])
    before = list(vars(optimizer)["_model_variables_moving_average"])
    with _private.averages_of_own(keras.optimizers.LossScaleOptimizer(optimizer)):
        (average,) = vars(optimizer)["_model_variables_moving_average"]
        assert vars(optimizer)["_trainable_variables"] == [here]
        assert average is before[1]
    assert list(vars(optimizer)["_model_variables_moving_average"]) == before
