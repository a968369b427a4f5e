from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from processes import check_ranks

import opensmp as smp
from opensmp.errors import NotInitializedError, StepError


def test_in_one_process_they_are_all(smp_init):
    smp_init({"partitions": 2})
    layer, other = keras.layers.Dense(2), keras.layers.Dense(2)
    layer.build((None, 3))
    other.build((None, 3))
    assert smp.local_variables(layer) == smp.local_variables(layer.weights) == layer.weights
    pairs = list(zip(layer.weights, other.weights, strict=True))
    assert smp.local_variables(layer, other.weights) == pairs
    plain = tf.Variable(1.0)
    assert smp.local_variables([plain])[0] is plain
    assert smp.local_variables() == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: ([keras.Variable(1.0)], []), "received 1, 0"),
        (lambda: (3,), "received int"),
        (lambda: ([3],), "received int"),
        (lambda: (tf.Variable(1.0),), "Expected: models, layers, or lists"),
    ],
)
def test_faults(smp_init, given, message):
    smp_init({"partitions": 2})
    with pytest.raises(StepError, match=message):
        smp.local_variables(*given())


def test_before_init():
    with pytest.raises(NotInitializedError):
        smp.local_variables([])


@pytest.mark.parametrize("n", [2, 4])
def test_equal_models_are_cut_equally(n):
    """Whatever their names are, and whatever they are called with first."""
    script = """
    import keras, numpy as np, tensorflow as tf
    import opensmp as smp
    smp.init()

    def network(name):
        x = inputs = keras.Input((16, 16, 3))
        for k in range(4):
            x = keras.layers.Conv2D(4 * 2**k, 3, padding="same", name=f"{name}_{k}")(x)
            x = keras.layers.BatchNormalization()(x)
        x = keras.layers.GlobalAveragePooling2D()(x)
        return keras.Model(inputs, keras.layers.Dense(4)(x), name=name)

    wrap = smp.DistributedModel.from_keras
    online = network("online")
    target, clone = wrap(network("a_target")), wrap(keras.models.clone_model(online))
    online = wrap(online)
    target(np.zeros((1, 16, 16, 3), "float32"))
    online.compile("sgd", "mse")
    x, y = np.ones((64, 16, 16, 3), "float32"), np.zeros((64, 4), "float32")
    online.fit(x, y, batch_size=64, verbose=0)
    clone(x)

    before = target.get_weights(), online.get_weights()
    count = 0
    for a, b, c in smp.local_variables(target, online, clone):
        a.assign(0.9 * a + 0.1 * b)
        c.assign(b)
        count += 1
    assert 0 < count < len(target.weights)
    assert sum(smp.allgather(count, smp.MP_GROUP)) == len(target.weights)
    for value, a, b in zip(target.get_weights(), *before, strict=True):
        np.testing.assert_allclose(value, 0.9 * a + 0.1 * b, rtol=1e-5, atol=1e-6)
    for value, b in zip(clone.get_weights(), before[1], strict=True):
        np.testing.assert_array_equal(value, b)

    try:
        smp.local_variables(target.weights, target.weights[::-1])
    except smp.StepError as error:
        raise
    except smp.SmpError as error:
        assert "lie in different processes" in str(error) and "on rank" in str(error), error
    else:
        raise AssertionError("no error")
    """
    check_ranks(script, n, {"partitions": 2, "microbatches": 2})


def test_values_of_loops_are_those_of_one_process(smp_init):
    smp_init({"partitions": 2})
    target, online = keras.layers.Dense(2), keras.layers.Dense(2)
    target.build((None, 3))
    online.build((None, 3))
    expected = [
        0.9 * a.numpy() + 0.1 * b.numpy()
        for a, b in zip(target.weights, online.weights, strict=True)
    ]
    for a, b in smp.local_variables(target, online):
        a.assign(0.9 * a + 0.1 * b)
    np.testing.assert_allclose(target.kernel.numpy(), expected[0], rtol=1e-6)
