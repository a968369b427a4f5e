"""`tf.gradients` through a split model; the model is 3 * (2 * x), its derivative by x is 6."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import opensmp as smp
from opensmp.errors import StepError

TWO = {"partitions": 2, "microbatches": 2}


class Product(keras.Model):
    """v * (w * x), with w = 2 and v = 3."""

    def __init__(self) -> None:
        super().__init__()
        constant = keras.initializers.Constant
        self.first = keras.layers.Dense(
            1,
            use_bias=False,
            kernel_initializer=constant(2.0),
            kernel_regularizer="l2",
            activity_regularizer="l2",
        )
        self.second = keras.layers.Dense(1, use_bias=False, kernel_initializer=constant(3.0))

    def call(self, x):
        return self.second(self.first(x))


def ones() -> tf.Tensor:
    return tf.ones([4, 1])


def product(kind: type = Product) -> smp.DistributedModel:
    model = smp.DistributedModel.from_keras(kind())
    model(ones())
    model.compile("sgd", "mse")
    return model


def by_weights(model, x):
    loss = tf.reduce_mean(model(x) ** 2)
    return tf.gradients(loss, [variable.value for variable in model.trainable_variables])[0]


def by_the_input(model, x):
    return tf.gradients(model(x), [x])[0]


def of_losses(model, x):
    model(x)
    return tf.gradients(sum(model.losses), [model.first.kernel.value])[0]


def under_a_tape(model, x):
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(model(x) ** 2)
    assert tape.gradient(loss, model.trainable_variables)[0] is not None
    return tf.gradients(loss, [x])[0]


def unrelated(model, x):
    return tf.gradients(tf.stop_gradient(model(x)) * x, [x])[0]


def in_a_function(model, x):
    inner = tf.function(lambda x: model(x))
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(inner(x) ** 2)
    return tape.gradient(loss, model.trainable_variables)[0]


def in_a_function_but_not_asked(model, x):
    inner = tf.function(lambda x: model(x))
    with tf.GradientTape() as tape:
        used = tf.reduce_mean(inner(x))
        loss = tf.reduce_mean(model(x)) + tf.stop_gradient(used)
    return tape.gradient(loss, model.trainable_variables)[0]


def run(step, name: str = "train"):
    """What fit or evaluate log for a step of one's own that returns `step(model, x)`."""

    class Model(Product):
        pass

    def own_step(self, x):
        return {"result": tf.reduce_mean(step(self, x))}

    setattr(Model, f"{name}_step", own_step)
    model = product(Model)
    if name == "train":
        return model.fit(ones(), batch_size=4, verbose=0).history["result"][0]
    return model.evaluate(ones(), batch_size=4, verbose=0, return_dict=True)["result"]


class TestTrainers:
    @pytest.mark.parametrize("name", ["train", "test"])
    @pytest.mark.parametrize("step", [by_weights, by_the_input, of_losses, under_a_tape])
    def test_it_is_refused_while_tracing(self, step, name, smp_init):
        smp_init(TWO)
        with pytest.raises(StepError, match=r"^tf\.gradients was asked") as error:
            run(step, name)
        assert error.match(r"with tf\.GradientTape\(\) as tape:")

    def test_in_a_loss(self, smp_init):
        smp_init(TWO)

        class Model(Product):
            def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
                return tf.reduce_mean(tf.gradients(y_pred, [x])[0] ** 2)

        with pytest.raises(StepError, match=r"^tf\.gradients was asked"):
            product(Model).fit(ones(), ones(), batch_size=4, verbose=0)

    def test_of_other_things_it_works(self, smp_init):
        smp_init(TWO)
        assert run(unrelated) == 6.0

    def test_in_a_step_that_a_train_step_calls_it_works(self, smp_init):
        smp_init(TWO)

        @smp.step
        def derivative(x):
            return tf.gradients(model(x), [x])[0]

        class Model(Product):
            def train_step(self, x):
                return {"derivative": tf.reduce_mean(derivative(x).merge())}

        model = product(Model)
        assert model.fit(ones(), batch_size=4, verbose=0).history == {"derivative": [6.0]}

    def test_a_function_around_fails_only_if_its_gradient_is_used(self, smp_init):
        smp_init(TWO)
        assert run(in_a_function_but_not_asked) == 3.0
        with pytest.raises(tf.errors.InvalidArgumentError, match="outside of the function that"):
            run(in_a_function)


class TestOutside:
    @pytest.mark.parametrize("what", [by_the_input, by_weights])
    def test_of_steps_it_is_refused(self, what, smp_init):
        smp_init(TWO)
        model = product()
        with pytest.raises(StepError, match="is a forward pass alone"):
            tf.function(lambda x: what(model, x))(ones())

    def test_inside_of_steps_it_works(self, smp_init):
        smp_init(TWO)
        model = product()

        @smp.step
        def step(x):
            return by_the_input(model, x), by_weights(model, x)

        of_input, of_weight = step(ones())
        np.testing.assert_array_equal(of_input.merge(), 6.0 * ones())
        assert float(tf.squeeze(of_weight.accumulate())) == 36.0
