from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from small import TWO_BY_TWO, Net, Scale, batch, device_index

import opensmp as smp
from opensmp.errors import StepError

COLUMN = tf.constant([[1.0], [2.0]])


def test_the_decorator_returns_the_function():
    def hook():
        pass

    assert smp.register_post_partition_hook(hook) is hook


def test_a_hook_runs_once_eagerly_after_partitioning_and_before_the_first_pass(smp_init):
    smp_init(TWO_BY_TWO)
    model = Scale(3.0)
    seen = []

    @smp.register_post_partition_hook
    def hook():
        assert tf.executing_eagerly()
        seen.append(device_index(model.factor.value))
        model.factor.assign(5.0)

    @smp.step
    def forward(x):
        return model(x)

    assert seen == []
    assert forward(COLUMN).merge().numpy().tolist() == [[5.0], [10.0]]
    assert seen == [1]
    model.factor.assign(2.0)
    forward(COLUMN)
    forward(tf.concat([COLUMN, COLUMN], 0))
    assert seen == [1]
    assert float(model.factor) == 2.0


def test_a_hook_loads_weights_of_a_model_that_was_never_built(smp_init, tmp_path):
    smp_init(TWO_BY_TWO)
    trained, model = Net(), Net()
    x = batch(4)
    expected = trained(x)
    trained.save_weights(tmp_path / "start.weights.h5")

    @smp.register_post_partition_hook
    def load():
        model.load_weights(tmp_path / "start.weights.h5")

    @smp.step
    def forward(x):
        return model(x)

    @tf.function
    def outer(x):
        return forward(x).merge()

    np.testing.assert_allclose(outer(x), expected, rtol=1e-6)


def test_a_hook_restores_a_checkpoint_of_model_and_optimizer(smp_init, tmp_path):
    smp_init(TWO_BY_TWO)

    def make():
        return Net(), keras.optimizers.Adam(0.1)

    def train(model, optimizer, steps):
        @smp.step
        def backward(x):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(tf.square(model(x)))
            return tape.gradient(loss, model.trainable_variables)

        for _ in range(steps):
            gradients = [g.accumulate() for g in backward(batch(4))]
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    one, its_optimizer = make()
    train(one, its_optimizer, 2)
    path = tf.train.Checkpoint(model=one, optimizer=its_optimizer).write(str(tmp_path / "ckpt"))
    train(one, its_optimizer, 2)

    two, other = make()

    @smp.register_post_partition_hook
    def restore():
        other.build(two.trainable_variables)
        tf.train.Checkpoint(model=two, optimizer=other).read(path).assert_consumed()

    train(two, other, 2)
    for a, b in zip(one.get_weights(), two.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_all_models_of_a_step_are_partitioned_when_it_runs(smp_init):
    smp_init(TWO_BY_TWO)
    first, second = Net(), Net(units=5)
    seen = []

    @smp.register_post_partition_hook
    def hook():
        seen.extend(len(model.get_weights()) for model in (first, second))

    @smp.step
    def forward(x):
        return first(second(x))

    forward(batch(4))
    assert seen == [4, 4]


def test_hooks_run_in_the_order_of_registration(smp_init):
    smp_init(TWO_BY_TWO)
    seen = []
    for i in range(3):
        smp.register_post_partition_hook(lambda i=i: seen.append(i))
    Scale()(COLUMN)
    assert seen == [0, 1, 2]


def test_a_call_outside_of_a_step_counts_as_the_first_pass(smp_init):
    smp_init(TWO_BY_TWO)
    model = Scale(3.0)
    smp.register_post_partition_hook(lambda: model.factor.assign(4.0))
    assert model(COLUMN).numpy().tolist() == [[4.0], [8.0]]


def test_a_hook_that_is_registered_later_runs_after_the_next_partitioning(smp_init):
    smp_init(TWO_BY_TWO)
    Scale()(COLUMN)
    seen = []
    smp.register_post_partition_hook(lambda: seen.append("ran"))
    assert seen == []
    Scale()(COLUMN)
    assert seen == ["ran"]


def test_a_hook_may_call_the_model(smp_init):
    smp_init(TWO_BY_TWO)
    model = Scale(3.0)
    seen = []
    smp.register_post_partition_hook(lambda: seen.append(model(COLUMN).numpy().tolist()))

    @smp.step
    def forward(x):
        return model(x)

    forward(COLUMN)
    assert seen == [[[3.0], [6.0]]]


def test_an_error_in_a_hook_reaches_the_caller(smp_init):
    smp_init(TWO_BY_TWO)

    @smp.register_post_partition_hook
    def hook():
        raise FileNotFoundError("no such checkpoint")

    @smp.step
    def forward(x):
        return model(x)

    model = Scale()
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        forward(COLUMN)
    assert forward(COLUMN).merge().numpy().tolist() == [[3.0], [6.0]]


def test_shutdown_forgets_hooks_that_wait(smp_init):
    smp_init(TWO_BY_TWO)
    seen = []
    smp.register_post_partition_hook(lambda: seen.append("ran"))
    smp_init(TWO_BY_TWO)
    Scale()(COLUMN)
    assert seen == []


@pytest.mark.parametrize("hook", [None, 3, "load"])
def test_what_cannot_be_called_is_refused(hook):
    with pytest.raises(StepError) as caught:
        smp.register_post_partition_hook(hook)
    assert "expected a function without arguments" in str(caught.value)
    assert repr(hook) in str(caught.value)


def test_a_function_with_arguments_is_refused_when_it_is_registered():
    with pytest.raises(StepError, match=r"without arguments, .* missing .*'model'"):

        @smp.register_post_partition_hook
        def hook(model):
            pass
