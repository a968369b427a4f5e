from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from processes import check_ranks
from small import TWO_BY_FOUR, TWO_BY_TWO

import opensmp as smp

CHECKED = {**TWO_BY_TWO, "check_finite": True}


@pytest.fixture(autouse=True)
def checked():
    smp.init(CHECKED)
    yield
    smp.shutdown()


def again(**config):
    smp.shutdown()
    smp.init({**CHECKED, **config})


def model(first=lambda x: x, second=lambda x: x) -> Any:
    """Dense, a function and Dense; the second half in partition 1."""
    keras.utils.set_random_seed(3)
    with smp.partition(0):
        inputs = keras.Input((4,))
        x = keras.layers.Dense(4, name="low", kernel_initializer="ones")(inputs)
        x = keras.layers.Lambda(first, name="one")(x)
    with smp.partition(1):
        x = keras.layers.Lambda(second, name="two")(x)
        x = keras.layers.Dense(2, name="high", kernel_initializer="ones")(x)
    return smp.DistributedModel.from_keras(keras.Model(inputs, x, name="net"))


def run(net, x=None, loss=tf.reduce_mean, compiled=True, apply=lambda gradients: None):
    @smp.step
    def forward_backward(x):
        with tf.GradientTape() as tape:
            value = loss(net(x, training=True))
        return tape.gradient(value, net.trainable_variables), value

    def train(x):
        gradients, value = forward_backward(x)
        gradients = [each.accumulate() for each in gradients]
        apply(gradients)
        return gradients, value.reduce_mean()

    train = tf.function(train) if compiled else train
    return train(tf.ones((8, 4)) if x is None else tf.constant(x))


def first(*args, **kwargs):
    """What the error says of the first place, up to the list of others."""
    with pytest.raises(smp.NonFiniteError) as caught:
        run(*args, **kwargs)
    return str(caught.value).split("infinite) is ")[1].split(". ")[0]


def sqrt_of_nothing(x):
    """Zero, with a gradient that is nan."""
    return tf.sqrt(x * 0)


@pytest.mark.parametrize("compiled", [True, False])
def test_the_layer_of_the_first_activation_is_named(compiled):
    x = np.ones((8, 4), np.float32)
    x[4:] = -1
    net = model(second=lambda x: tf.math.log(x))
    expected = "the activation of layer 'two', in partition 1, microbatch 1"
    assert first(net, x, compiled=compiled) == expected


def test_the_first_of_several_is_named():
    net = model(first=lambda x: x / 0, second=lambda x: tf.math.log(-x))
    assert first(net) == "the activation of layer 'one', in partition 0, microbatch 0"


def test_the_gradient_of_a_variable_is_named_where_activations_are_finite():
    expected = "the gradient of variable 'low/kernel', in partition 0, microbatch 0"
    assert first(model(first=sqrt_of_nothing)) == expected


def test_the_partition_in_which_a_gradient_goes_wrong_is_named():
    expected = "the gradient of the activation of layer 'one', in partition 1, microbatch 0"
    assert first(model(first=lambda x: x + 1, second=sqrt_of_nothing)) == expected


def test_a_gradient_of_joined_microbatches_is_that_of_their_sum():
    again(**TWO_BY_FOUR, optimize="speed")
    expected = (
        "the gradient of variable 'low/kernel', in partition 0, summed over microbatches 0 to 1"
    )
    x = np.ones((8, 256), np.float32)
    with smp.partition(0):
        inputs = keras.Input((256,))
        y = keras.layers.Dense(256, use_bias=False, name="low")(inputs)
        y = keras.layers.Lambda(sqrt_of_nothing, name="one")(y)
    with smp.partition(1):
        y = keras.layers.Dense(2, name="high")(y)
    net = smp.DistributedModel.from_keras(keras.Model(inputs, y))
    assert first(net, x) == expected


def test_data_that_are_not_finite_are_named_with_their_microbatch():
    x = np.ones((8, 4), np.float32)
    x[7, 1] = np.nan
    assert first(model(), x) == "input 0 of model 'net', in partition 0, microbatch 1"


def test_a_loss_that_is_not_finite_is_told_from_the_model():
    expected = (
        "the gradient of the loss with respect to an output of model 'net', in partition 1, "
        "microbatch 0"
    )
    assert first(model(), loss=lambda outputs: tf.reduce_sum(outputs) * np.nan) == expected


def test_layers_in_layers_are_named_by_their_path():
    class Block(keras.layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.inner = keras.layers.Activation(lambda x: x / 0, name="inner")

        def call(self, x):
            return self.inner(x) + 1

    class Net(smp.DistributedModel):
        def __init__(self):
            super().__init__()
            self.block = Block(name="block")
            self.top = keras.layers.Dense(2, name="top")

        def call(self, x, training=None):
            return self.top(self.block(x * self.top_scale()))

        def top_scale(self):
            return 2.0

    net = Net()
    net.top.build((None, 4))
    assert first(net) == "the activation of layer 'block/inner', in partition 0, microbatch 0"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_large_values_whose_squares_overflow_are_no_fault(dtype):
    large = {"float16": 6e4, "bfloat16": 1e25, "float32": 1e25, "float64": 1e30}[dtype]
    net = model(second=lambda x: tf.cast(tf.cast(x * 0 + 1, dtype) * large, "float32") * 0)
    assert np.isfinite(run(net)[1].numpy())


def test_infinity_in_half_precision_is_found():
    net = model(second=lambda x: tf.cast(x, "float16") * 6e4)
    assert first(net) == "the activation of layer 'two', in partition 1, microbatch 0"


def test_numbers_are_those_without_checks():
    found = run(model(second=tf.nn.gelu))
    again(check_finite=False)
    others = run(model(second=tf.nn.gelu))
    for one, other in zip(tf.nest.flatten(found), tf.nest.flatten(others), strict=True):
        np.testing.assert_array_equal(one, other)


def operations_of_a_step():
    net = model()

    @smp.step
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(net(x, training=True))
        return tape.gradient(loss, net.trainable_variables), loss

    graph = step.get_concrete_function(tf.ones((8, 4))).graph.as_graph_def()
    inside = [node.op for function in graph.library.function for node in function.node_def]
    return [node.op for node in graph.node] + inside


def test_without_checks_nothing_is_added_to_a_step():
    added = {"IsFinite", "PyFunc", "EagerPyFunc"}
    assert added & set(operations_of_a_step()) == {"IsFinite", "PyFunc"}
    again(check_finite=False)
    assert not added & set(operations_of_a_step())


@pytest.mark.parametrize("config", [{}, {"partitions": 1, "microbatches": 1}])
def test_a_bad_step_leaves_the_variables_as_they_were(config):
    again(**config)
    with smp.partition(0):
        inputs = keras.Input((4,))
        x = keras.layers.BatchNormalization()(inputs)
        x = keras.layers.Dropout(0.1)(keras.layers.Dense(4)(x))
    net = smp.DistributedModel.from_keras(keras.Model(inputs, x))
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)

    def apply(gradients):
        optimizer.apply_gradients(zip(gradients, net.trainable_variables, strict=True))

    def loss(outputs):
        return tf.reduce_sum(outputs) * np.nan

    def state():
        return [v.numpy() for v in (*net.variables, *optimizer.variables[2:])]

    run(net, np.random.default_rng(0).normal(size=(8, 4)).astype("float32"), apply=apply)
    before = state()
    for _ in range(3):
        with pytest.raises(smp.NonFiniteError):
            run(net, loss=loss, apply=apply)
    for one, other in zip(before, state(), strict=True):
        np.testing.assert_array_equal(one, other)
    run(net, apply=apply)


def test_the_run_of_a_step_is_counted_and_the_step_goes_on_after_an_error():
    net = model(second=tf.math.log)

    @smp.step
    def step(x):
        return net(x)

    for number in range(1, 13):
        if number % 4:
            step(tf.ones((4, 4)))
            continue
        with pytest.raises(smp.NonFiniteError, match=f"in run {number} of step 'step'"):
            step(-tf.ones((4, 4)))


def test_gradients_of_a_scaled_loss_may_overflow_and_activations_may_not():
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(), initial_scale=1e38)

    def loss(outputs):
        return optimizer.scale_loss(tf.reduce_sum(outputs * 100))

    assert not np.isfinite(run(model(), loss=loss)[0][0]).all()
    net = model(second=lambda x: x / 0)
    assert first(net, loss=loss) == "the activation of layer 'two', in partition 1, microbatch 0"


def test_a_model_called_outside_of_a_step_is_checked():
    with pytest.raises(smp.NonFiniteError, match="layer 'two', in partition 1"):
        model(second=lambda x: x / 0)(tf.ones((4, 4)))


IN_RANKS = """
import keras, numpy as np, tensorflow as tf
import opensmp as smp
smp.init({"check_finite": True, "auto_partition": False, "default_partition": 0})

class Log(keras.layers.Layer):
    def call(self, x):
        return tf.math.log(x) if self.name == bad else x

for place, bad in enumerate(("zero", "one")):
    with smp.partition(0):
        inputs = keras.Input((4,))
        x = keras.layers.Dense(4, kernel_initializer="ones")(inputs)
        x = Log(name="zero")(x)
    with smp.partition(1):
        x = Log(name="one")(x)
        x = keras.layers.Dense(4)(x)
    model = smp.DistributedModel.from_keras(keras.Model(inputs, x))
    model.compile("sgd", "mse")
    data = np.ones((4, 4)), np.ones((4, 4))
    model.train_on_batch(*data)
    before = model.get_weights()
    for _ in range(4):
        try:
            model.train_on_batch(-data[0], data[1])
        except smp.NonFiniteError as error:
            text = f"layer '{bad}', in partition {place}, rank {place}, microbatch 0"
            print(text in str(error), end=" ")
    same = all(map(np.array_equal, before, model.get_weights()))
    model.train_on_batch(*data)
    changed = not all(map(np.array_equal, before, model.get_weights()))
    print(same, changed, flush=True)
"""


def test_all_ranks_get_the_error_and_go_on():
    config = {"partitions": 2, "microbatches": 2}
    for rank in check_ranks(IN_RANKS, 2, config=config):
        assert rank.lines[-2:] == ["True True True True True True"] * 2, rank.output
