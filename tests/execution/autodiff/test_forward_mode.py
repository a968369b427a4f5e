"""Forward-mode derivatives through a split model: the right value, or an error, never none.

The model is v * (w * x) with w = 2 and v = 3; its derivative is 6 by x and 3 by w.
"""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from processes import check_ranks

import opensmp as smp
from opensmp.errors import StepError

TWO = {"partitions": 2, "microbatches": 2}
REFUSED = "was called under a tf.autodiff.ForwardAccumulator that watches"


class Product(keras.Model):
    """v * (w * x)."""

    def __init__(self) -> None:
        super().__init__()
        constant = keras.initializers.Constant
        self.first = keras.layers.Dense(1, use_bias=False, kernel_initializer=constant(2.0))
        self.second = keras.layers.Dense(1, use_bias=False, kernel_initializer=constant(3.0))

    def call(self, x):
        return self.second(self.first(x))


def ones() -> tf.Tensor:
    return tf.ones([4, 1])


def product(kind: type = Product) -> smp.DistributedModel:
    model = smp.DistributedModel.from_keras(kind())
    model(ones())
    return model


def watching(what: str, model, x):
    """An accumulator of an input, of a weight, or of nothing that the model reads."""
    primal = {"input": x, "derived": x, "weight": model.first.kernel.value, "nothing": tf.ones([])}
    return tf.autodiff.ForwardAccumulator(primal[what], tf.ones_like(primal[what]))


def numbers(tensor) -> set[float]:
    return set(np.asarray(tensor).ravel().tolist())


class TestOutsideOfSteps:
    @pytest.mark.parametrize("traced", [False, True])
    @pytest.mark.parametrize(("what", "right"), [("input", 6.0), ("weight", 3.0)])
    def test_the_value_is_right(self, what, right, traced, smp_init):
        smp_init(TWO)
        model = product()
        x = ones()
        call = tf.function(lambda x: model(x)) if traced else model
        with watching(what, model, x) as accumulator:
            y = call(x)
        assert numbers(y) == {6.0}
        assert numbers(accumulator.jvp(y)) == {right}

    def test_of_a_model_that_was_not_called_before(self, smp_init):
        smp_init(TWO)
        model = smp.DistributedModel.from_keras(Product())
        x = ones()
        with tf.autodiff.ForwardAccumulator(x, ones()) as accumulator:
            y = model(x)
        assert numbers(accumulator.jvp(y)) == {6.0}
        assert numbers(model(x)) == {6.0}
        assert model.plan is not None

    def test_one_that_watches_nothing_of_the_model_does_no_harm(self, smp_init):
        smp_init(TWO)
        model = product()
        with watching("nothing", model, ones()) as accumulator:
            y = model(ones())
        assert accumulator.jvp(y) is None
        assert numbers(y) == {6.0}

    @pytest.mark.parametrize("what", ["input", "weight"])
    def test_a_function_that_was_traced_before_fails(self, what, smp_init):
        smp_init(TWO)
        model = product()
        call = tf.function(lambda x: model(x))
        call(ones())
        x = ones()
        with (
            watching(what, model, x),
            pytest.raises(tf.errors.InvalidArgumentError, match="In forward mode"),
        ):
            call(x)

    def test_a_tape_is_refused_as_a_tape(self, smp_init):
        smp_init(TWO)
        model = product()
        x = ones()
        with (
            watching("nothing", model, x),
            tf.GradientTape(),
            pytest.raises(StepError, match=r"under a tf\.GradientTape"),
        ):
            model(x)


class TestSteps:
    @pytest.mark.parametrize("what", ["input", "derived", "weight"])
    def test_inside(self, what, smp_init):
        smp_init(TWO)
        model = product()

        @smp.step
        def step(x):
            with watching(what, model, x):
                return model(x * 1.0 if what == "derived" else x)

        with pytest.raises(StepError, match=f"^Model 'product.*' {REFUSED}") as error:
            step(ones())
        watched = "the variable 'product.*kernel'" if what == "weight" else "an input of shape"
        assert error.match(f"{REFUSED} {watched}")
        assert error.match(r"model\.to_keras\(\)")
        assert error.match("by two tapes")

    @pytest.mark.parametrize("what", ["input", "weight"])
    @pytest.mark.parametrize("traced", ["before", "now", "in a function", "in a function before"])
    def test_around(self, what, traced, smp_init):
        smp_init(TWO)
        model = product()

        @smp.step
        def step(x):
            return model(x)

        def run(x):
            with watching(what, model, x):
                return step(x).merge()

        if traced == "before":
            step(ones())
        if traced == "in a function before":
            inner = tf.function(lambda x: step(x).merge())
            inner(ones())
            x = ones()
            with watching(what, model, x), pytest.raises(tf.errors.InvalidArgumentError):
                inner(x)
            return
        with pytest.raises(StepError, match=rf"^smp\.step\('step'\) {REFUSED}"):
            (tf.function(run) if traced == "in a function" else run)(ones())

    def test_a_variable_that_the_model_does_not_track(self, smp_init):
        smp_init(TWO)
        factor = tf.Variable(2.0, name="factor")

        class Scaled(Product):
            def call(self, x):
                return super().call(x) * factor

        model = product(Scaled)

        @smp.step
        def step(x):
            with tf.autodiff.ForwardAccumulator(factor, tf.ones([])):
                return model(x)

        with pytest.raises(StepError, match=f"{REFUSED} the variable 'factor"):
            step(ones())

    def test_one_that_watches_nothing_of_the_model_does_no_harm(self, smp_init):
        smp_init(TWO)
        model = product()

        @smp.step
        def step(x):
            with (
                watching("nothing", model, x) as accumulator,
                tf.GradientTape(persistent=True) as tape,
            ):
                y = model(x)
            assert accumulator.jvp(y) is None
            return tape.gradient(y, model.trainable_variables), y

        with watching("nothing", model, ones()):
            gradients, y = step(ones())
        assert [numbers(g.reduce_sum()) for g in gradients] == [{12.0}, {8.0}]
        assert numbers(y.merge()) == {6.0}

    def test_one_of_the_output_sees_what_comes_after(self, smp_init):
        smp_init(TWO)
        model = product()

        @smp.step
        def step(x):
            y = model(x)
            with tf.autodiff.ForwardAccumulator(y, tf.ones_like(y)) as accumulator:
                squared = y**2
            return accumulator.jvp(squared)

        assert numbers(step(ones()).merge()) == {12.0}


def fitted(what: str):
    """A model whose train_step calls it under an accumulator."""

    class Model(Product):
        def train_step(self, x):
            with watching(what, self, x) as accumulator, tf.GradientTape() as tape:
                y = self(x * 1.0 if what == "derived" else x)
            assert accumulator.jvp(y) is None
            gradients = tape.gradient(y, self.trainable_weights)
            return {"w": tf.reduce_sum(gradients[0]), "v": tf.reduce_sum(gradients[1])}

    model = product(Model)
    model.compile()
    return model


class TestFit:
    @pytest.mark.parametrize("what", ["input", "derived", "weight"])
    def test_it_is_refused(self, what, smp_init):
        smp_init(TWO)
        model = fitted(what)
        with pytest.raises(StepError, match=f"^Model '.*' {REFUSED}"):
            model.fit(ones(), batch_size=4, verbose=0)

    def test_one_that_watches_nothing_of_the_model_does_no_harm(self, smp_init):
        smp_init(TWO)
        history = fitted("nothing").fit(ones(), batch_size=4, verbose=0).history
        assert history == {"w": [12.0], "v": [8.0]}

    def test_a_function_in_a_train_step_is_never_without_derivative(self, smp_init):
        smp_init(TWO)

        class Model(Product):
            def train_step(self, x):
                inner = tf.function(lambda x: self(x))
                with watching("input", self, x) as accumulator:
                    y = inner(x)
                return {"derivative": tf.reduce_mean(accumulator.jvp(y))}

        model = product(Model)
        model.compile()
        with pytest.raises((StepError, tf.errors.InvalidArgumentError), match="In forward mode"):
            model.fit(ones(), batch_size=4, verbose=0)


def test_several_processes_refuse_it_outside_of_steps_too():
    check_ranks(
        """
import keras, tensorflow as tf
import opensmp as smp
from opensmp.errors import StepError
smp.init({"partitions": 2})
model = smp.DistributedModel.from_keras(
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(2), keras.layers.Dense(1)])
)
x, other = tf.ones([4, 2]), tf.ones([])
with tf.autodiff.ForwardAccumulator(other, other):
    y = model(x)
try:
    with tf.autodiff.ForwardAccumulator(x, x):
        model(x)
except StepError as error:
    assert "ForwardAccumulator that watches an input of shape (4, 2)" in str(error), error
else:
    raise AssertionError("no error")
assert y.shape == (4, 1)
""",
        2,
    )
