from __future__ import annotations

import collections

import keras
import numpy as np
import pytest
import tensorflow as tf
from small import MANUAL

import opensmp as smp
from opensmp.compiler.lowering.program import Program
from opensmp.config import Config
from opensmp.distributed import world
from opensmp.execution.emission.weight_gradient_batching import group_size

WIDE = 32
SPEED = {**MANUAL, "partitions": 2, "microbatches": 8, "optimize": "speed"}


class Wide(smp.DistributedModel):
    """Layers with more units than a microbatch has rows; if `tied`, then the first kernel again."""

    def __init__(self, tied=False):
        super().__init__()
        self.layers_ = [keras.layers.Dense(WIDE, activation="tanh") for _ in range(2)]
        self.tied = tied

    def call(self, x, training=None):
        with smp.partition(0):
            x = self.layers_[0](x)
        with smp.partition(world.current("a test").config.partitions - 1):
            x = self.layers_[1](x)
            return x @ tf.convert_to_tensor(self.layers_[0].kernel) if self.tied else x


def inputs(rows=16):
    return tf.constant(np.random.default_rng(0).normal(size=(rows, WIDE)), tf.float32)


def backward_step(model, more=lambda gradients: None):
    @smp.step
    def backward(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True)))
        gradients = tape.gradient(loss, model.trainable_variables)
        return gradients, loss, more(gradients)

    return backward


def kinds(step):
    """How often each kind of action is in the schedule."""
    orders = step.schedule.orders
    return collections.Counter(action.kind for order in orders for action in order)


def expected(model, rows=16):
    """Mean gradients of the microbatches in plain TensorFlow."""
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.square(model(inputs(rows), training=True)))
    return tape.gradient(loss, model.trainable_variables)


def plain(tied=False):
    """The same model and weights without a pipeline."""
    keras.utils.set_random_seed(3)
    layers = [keras.layers.Dense(WIDE, activation="tanh") for _ in range(2)]
    layers[0].build((None, WIDE))
    layers[1].build((None, WIDE))

    class Plain(keras.Model):
        def call(self, x, training=None):
            x = layers[1](layers[0](x))
            return x @ tf.convert_to_tensor(layers[0].kernel) if tied else x

    model = Plain()
    model.own = layers
    return model


def made(tied=False):
    keras.utils.set_random_seed(3)
    return Wide(tied)


def run(step, reduce, rows=16):
    """The gradients that `reduce` makes of a step's outputs in a function around it."""

    @tf.function
    def whole(x):
        gradients, *_ = step(x)
        return [reduce(gradient) for gradient in gradients]

    return [tf.convert_to_tensor(g).numpy() for g in whole(inputs(rows))]


def assert_close(found, model, rows=16):
    for gradient, wanted in zip(found, expected(model, rows), strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-7)


class TestGroupSize:
    @pytest.mark.parametrize(
        ("microbatches", "size"), [(1, 1), (2, 1), (3, 1), (4, 2), (6, 3), (8, 4), (64, 4)]
    )
    def test_small_groups_of_which_several_are_left(self, microbatches, size):
        config = Config(partitions=4, microbatches=microbatches, optimize="speed")
        assert group_size(microbatches, config) == size

    def test_no_larger_than_what_may_be_in_flight(self):
        config = Config(2, microbatches=16, optimize="speed", active_microbatches=2)
        assert group_size(16, config) == 2

    def test_none_where_memory_counts(self):
        assert group_size(16, Config(2, microbatches=16)) == 1


class TestJoined:
    @pytest.mark.parametrize("pipeline", ["simple", "interleaved", "zero_bubble"])
    @pytest.mark.parametrize("partitions", [1, 2])
    @pytest.mark.parametrize("method", ["variable", "add_n", "accumulate_n"])
    def test_sums_come_from_few_calls(self, smp_init, pipeline, partitions, method):
        smp_init({**SPEED, "pipeline": pipeline, "partitions": partitions, "auto_partition": True})
        step = backward_step(made())
        assert_close(run(step, lambda g: g.accumulate(method)), plain())
        few = partitions == 1 and pipeline != "simple"  # three may be in flight
        groups = 3 if few else 2
        per_segment = {"F": 8, "B": 8, "W": groups}
        assert kinds(step) == {kind: partitions * n for kind, n in per_segment.items()}

    def test_each_way_to_the_sum(self, smp_init):
        smp_init(SPEED)
        step = backward_step(made())
        mean = run(step, lambda g: g.reduce_mean())
        assert_close(mean, plain())
        total = run(step, lambda g: g.reduce_sum())
        np.testing.assert_allclose(total[0], 8 * mean[0], rtol=1e-5, atol=1e-7)
        accumulated = [tf.Variable(tf.zeros_like(g)) for g in mean]
        waiting = iter(accumulated)
        assert_close(run(step, lambda g: g.accumulate(var=next(waiting))), plain())
        assert_close([variable.numpy() for variable in accumulated], plain())

    def test_groups_that_do_not_come_out_even(self, smp_init):
        smp_init({**SPEED, "microbatches": 9})
        step = backward_step(made())
        assert_close(run(step, lambda g: g.accumulate(), rows=18), plain(), rows=18)
        assert kinds(step)["W"] == 2 * 3

    def test_durations_count_every_microbatch(self, smp_init):
        smp_init(SPEED)
        step = backward_step(made())
        run(step, lambda g: g.accumulate())
        seconds = step.schedule.graph.seconds
        by_kind = {action.kind: length for action, length in seconds.items()}
        assert by_kind == {"F": 1.0, "B": 1.0, "W": 4.0}
        assert sum(seconds.values()) == 2 * 8 * 3.0

    def test_the_gradients_of_one_kernel_from_two_partitions(self, smp_init):
        smp_init(SPEED)
        step = backward_step(made(tied=True))
        assert_close(run(step, lambda g: g.accumulate()), plain(tied=True))
        assert kinds(step)["W"] == 2 * 2

    def test_a_timeline_has_the_joined_calls(self, smp_init):
        smp_init(SPEED)
        step = backward_step(made())
        with smp.record_timeline() as timeline:
            assert_close(run(step, lambda g: g.accumulate()), plain())
        actions = collections.Counter(event.action.kind for event in timeline.steps[-1].events)
        assert actions == {"F": 16, "B": 16, "W": 4}


class TestSingleGradients:
    """Those of each microbatch are there for whoever reads them, and computed for no one else."""

    @pytest.mark.parametrize("reads", ["outputs", "stack", "passed through a function"])
    def test_they_are_right(self, smp_init, reads):
        smp_init(SPEED)
        step = backward_step(made())
        again = tf.function(lambda output: output)
        how = {
            "outputs": lambda g: tf.add_n(g.outputs) / 8,
            "stack": lambda g: tf.reduce_mean(g.stack(), 0),
            "passed through a function": lambda g: again(g).accumulate(),
        }
        assert_close(run(step, how[reads]), plain())

    def test_what_is_made_of_each_is_summed_and_not_made_of_the_sum(self, smp_init):
        smp_init(SPEED)
        step = backward_step(made())

        def clipped(gradient):
            each = tf.nest.map_structure(lambda g: tf.clip_by_norm(g, 1e-3), gradient)
            return each.reduce_sum()

        for total, each in zip(run(step, clipped), run(step, lambda g: g.stack()), strict=True):
            wanted = sum(tf.clip_by_norm(g, 1e-3).numpy() for g in each)
            np.testing.assert_allclose(total, wanted, rtol=1e-4, atol=1e-8)

    def test_nothing_is_computed_twice(self, smp_init, monkeypatch):
        monkeypatch.setattr(Program, "is_worth_joining", lambda *_: True)
        smp_init(SPEED)
        calls = []

        @tf.custom_gradient
        def counted(kernel):
            def note(gradient):
                calls.append(gradient.shape)
                return gradient

            def gradient(upstream):
                noted = tf.numpy_function(note, [upstream], tf.float32, stateful=False)
                return tf.ensure_shape(noted, upstream.shape)

            return tf.identity(kernel), gradient

        class Counted(smp.DistributedModel):
            def __init__(self):
                super().__init__()
                self.first = keras.layers.Dense(WIDE)
                self.kernel = self.add_weight(shape=(WIDE, WIDE))

            def call(self, x, training=None):
                with smp.partition(0):
                    x = self.first(x)
                with smp.partition(1):
                    return x @ counted(tf.convert_to_tensor(self.kernel))

        step = backward_step(Counted())
        run(step, lambda g: g.accumulate())
        assert kinds(step)["W"] == 4
        calls.clear()
        run(step, lambda g: g.accumulate())
        assert len(calls) == 8

    def test_a_step_that_reads_them_itself_is_not_joined(self, smp_init):
        smp_init(SPEED)
        step = backward_step(made(), more=tf.linalg.global_norm)
        assert_close(run(step, lambda g: g.accumulate()), plain())
        assert kinds(step)["W"] == 16

    def test_nor_is_one_that_is_called_eagerly(self, smp_init):
        smp_init(SPEED)
        step = backward_step(made())
        gradients, *_ = step(inputs())
        assert_close([g.accumulate().numpy() for g in gradients], plain())
        assert kinds(step)["W"] == 8

    def test_nor_one_for_which_memory_counts(self, smp_init):
        smp_init({**SPEED, "optimize": "memory"})
        step = backward_step(made())
        assert_close(run(step, lambda g: g.accumulate()), plain())
        assert kinds(step)["W"] == 8


def test_fit_joins_what_it_adds_up(smp_init, monkeypatch):
    joined = []
    single = Program.fused_weight_gradients

    def noted(program, weights, is_shared, num_microbatches, is_open):
        joined.append(num_microbatches)
        return single(program, weights, is_shared, num_microbatches, is_open)

    monkeypatch.setattr(Program, "fused_weight_gradients", noted)
    histories = []
    for optimize in ("memory", "speed"):
        smp_init({"partitions": 2, "microbatches": 8, "optimize": optimize})
        keras.utils.set_random_seed(4)
        net = keras.Sequential(
            [keras.layers.Dense(WIDE, activation="gelu") for _ in range(3)]
            + [keras.layers.Dense(4)]
        )
        model = smp.DistributedModel.from_keras(net)
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        labels = np.random.default_rng(1).integers(0, 4, 64)
        history = model.fit(inputs(64), labels, batch_size=16, epochs=3, shuffle=False, verbose=0)
        histories.append(history.history["loss"])
        assert set(joined) == (set() if optimize == "memory" else {4})
    np.testing.assert_allclose(histories[1], histories[0], rtol=1e-5)
