from __future__ import annotations

import logging
import threading
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from small import MANUAL, batch, device_index

import opensmp as smp
from opensmp.errors import NotInitializedError, PartitionError

THREE = {**MANUAL, "partitions": 3, "microbatches": 2}


class Records(smp.DistributedModel):
    """Adds one weight after another, each in the contexts that `place` opens for it."""

    def __init__(self, count: int, place: Any) -> None:
        super().__init__()
        self.place = place
        self.shifts = [
            self.add_weight(shape=(), initializer="ones", name=f"shift_{i}") for i in range(count)
        ]

    def call(self, x):
        def add(x):
            self.next += 1
            return x + self.shifts[self.next - 1]

        self.next = 0
        return self.place(add, x)


def where(count: int, place: Any) -> list[int]:
    """The partition of each addition, read off its weight."""
    model = Records(count, place)
    assert model(tf.zeros([2])).numpy().tolist() == [count, count]
    return [device_index(shift.value) for shift in model.shifts]


class TestNesting:
    def test_outside_of_any_context_is_the_default_partition(self, smp_init):
        smp_init({**THREE, "default_partition": 2})
        assert where(1, lambda add, x: add(x)) == [2]

    def test_the_innermost_context_wins_and_leaving_restores_the_outer_one(self, smp_init):
        smp_init(THREE)

        def place(add, x):
            x = add(x)
            with smp.partition(1):
                x = add(x)
                with smp.partition(2):
                    x = add(x)
                    with smp.partition(0):
                        x = add(x)
                    x = add(x)
                x = add(x)
            return add(x)

        assert where(7, place) == [0, 1, 2, 0, 2, 1, 0]

    def test_an_exception_inside_restores_the_outer_context(self, smp_init):
        smp_init(THREE)

        def place(add, x):
            try:
                with smp.partition(2):
                    raise KeyError
            except KeyError:
                return add(x)

        assert where(1, place) == [0]

    def test_a_model_called_inside_a_context_inherits_it_where_it_says_nothing(self, smp_init):
        smp_init(THREE)
        inner = Records(1, lambda add, x: add(x))
        other = Records(1, lambda add, x: in_partition(1, add, x))

        class Outer(smp.DistributedModel):
            def __init__(self):
                super().__init__()
                self.inner, self.other = inner, other

            def call(self, x):
                with smp.partition(2):
                    return self.other(self.inner(x))

        Outer()(tf.zeros([2]))
        assert device_index(inner.shifts[0].value) == 2
        assert device_index(other.shifts[0].value) == 1

    def test_helpers_and_layers_may_open_contexts(self, smp_init):
        smp_init(THREE)

        class Placed(keras.layers.Layer):
            def build(self, shape):
                self.shift = self.add_weight(shape=(), name="shift")

            def call(self, x):
                with smp.partition(2):
                    return x + self.shift

        model = smp.DistributedModel.from_keras(keras.Sequential([Placed()]))
        model(tf.zeros([2, 1]))
        assert device_index(model.layers[0].shift.value) == 2

    def test_as_a_decorator(self, smp_init):
        smp_init(THREE)

        def place(add, x):
            return smp.partition(1)(add)(x)

        assert where(1, place) == [1]


def in_partition(index: int, function: Any, x: Any) -> Any:
    with smp.partition(index):
        return function(x)


class TestFunctionalApi:
    def test_contexts_around_layer_calls_while_a_model_is_built(self, smp_init):
        smp_init({**THREE, "default_partition": 1})
        inputs = keras.Input([4])
        with smp.partition(0):
            x = keras.layers.Dense(4)(inputs)
            with smp.partition(2):
                x = keras.layers.Dense(4)(x)
            x = keras.layers.Dense(4)(x)
        x = keras.layers.Dense(4)(x)
        model = smp.DistributedModel(inputs, x)
        model(batch(2, 4))
        assert [device_index(layer.kernel.value) for layer in model.layers[1:]] == [0, 2, 0, 1]

    def test_operations_of_keras_on_symbolic_tensors(self, smp_init):
        smp_init(THREE)
        inputs = keras.Input([4])
        with smp.partition(2):
            x = keras.ops.relu(inputs) * 2.0
        model = smp.DistributedModel(inputs, x)

        @smp.step
        def forward(x):
            return model(x)

        forward(batch(4, 4))
        assert [len(order) for order in forward.schedule.orders] == [0, 0, 2]

    def test_two_calls_of_one_layer_have_a_partition_each(self, smp_init):
        smp_init(THREE)
        layer = keras.layers.Dense(4, use_bias=False)
        inputs = keras.Input([4])
        with smp.partition(1):
            x = layer(inputs)
        with smp.partition(2):
            x = layer(x)
        model = smp.DistributedModel(inputs, x)

        @smp.step
        def forward(x):
            return model(x)

        y = forward(batch(4, 4)).merge()
        assert [len(order) for order in forward.schedule.orders] == [0, 2, 2]
        np.testing.assert_allclose(y, layer(layer(batch(4, 4))), rtol=1e-5, atol=1e-6)

    def test_marks_stay_when_an_existing_model_is_taken(self, smp_init):
        smp_init(THREE)
        inputs = keras.Input([4])
        with smp.partition(2):
            x = keras.layers.Dense(4)(inputs)
        plain = keras.Model(inputs, x)
        model = smp.DistributedModel.from_keras(plain)
        model(batch(2, 4))
        assert device_index(plain.layers[1].kernel.value) == 2

    def test_a_plain_model_built_with_contexts_is_a_plain_model(self, smp_init):
        smp_init(THREE)
        inputs = keras.Input([4])
        with smp.partition(2):
            x = keras.layers.Dense(4)(inputs)
        assert keras.Model(inputs, x)(batch(2, 4)).shape == (2, 4)


class TestLoops:
    def test_a_context_around_a_loop_takes_it_whole(self, smp_init):
        smp_init(THREE)

        def place(add, x):
            with smp.partition(2):
                shifted = add(x)
                return tf.while_loop(lambda i, y: i < 1, lambda i, y: (i + 1, shifted), [0, x])[1]

        assert where(1, place) == [2]

    @pytest.mark.parametrize("how", ["while_loop", "cond", "function", "map_fn"])
    def test_a_context_inside_a_body_is_an_error_that_says_where_to_put_it(self, smp_init, how):
        smp_init(THREE)

        def inside(x):
            with smp.partition(1):
                return x + 1.0

        bodies = {
            "while_loop": lambda x: tf.while_loop(
                lambda y: True, lambda y: [inside(y)], [x], maximum_iterations=1
            )[0],
            "cond": lambda x: tf.cond(tf.reduce_sum(x) > 0.0, lambda: inside(x), lambda: x),
            "function": lambda x: tf.function(inside)(x),
            "map_fn": lambda x: tf.map_fn(inside, x),
        }

        class Loops(smp.DistributedModel):
            def call(self, x):
                return bodies[how](x)

        with pytest.raises(PartitionError) as caught:
            Loops()(tf.zeros([2, 1]))
        message = str(caught.value)
        assert "smp.partition(1) was entered inside a loop body, a branch or a nested tf.function"
        assert "Put the smp.partition context around the loop" in message
        assert "Python loop" in message

    def test_a_python_loop_may_open_contexts(self, smp_init):
        smp_init(THREE)

        def place(add, x):
            for i in range(6):
                with smp.partition(i % 3):
                    x = add(x)
            return x

        assert where(6, place) == [0, 1, 2, 0, 1, 2]


class TestIndex:
    @pytest.mark.parametrize("index", [True, False, "1", 1.0, None, tf.constant(1), np.float32(1)])
    def test_it_must_be_an_integer(self, smp_init, index):
        smp_init(THREE)
        with (
            pytest.raises(PartitionError, match="must be an integer from 0 to 2, received"),
            smp.partition(index),
        ):
            pass

    @pytest.mark.parametrize("index", [-1, 3, 100])
    def test_it_must_be_the_number_of_a_partition(self, smp_init, index):
        smp_init(THREE)
        with (
            pytest.raises(PartitionError, match="there are 3 partitions, numbered 0 to 2"),
            smp.partition(index),
        ):
            pass

    def test_integers_of_numpy_are_integers(self, smp_init):
        smp_init(THREE)
        assert where(1, lambda add, x: in_partition(np.int64(2), add, x)) == [2]

    def test_one_partition_alone_is_named_in_the_singular(self, smp_init):
        smp_init({"partitions": 1})
        with (
            pytest.raises(PartitionError, match="there is 1 partition, 0") as caught,
            smp.partition(1),
        ):
            pass
        assert "at least 2" in str(caught.value)

    def test_before_init(self):
        with (
            pytest.raises(NotInitializedError, match=r"smp\.partition was used before smp\.init"),
            smp.partition(0),
        ):
            pass


class TestAutoPartition:
    def test_contexts_are_ignored_with_one_warning(self, smp_init, caplog):
        smp_init({"partitions": 2, "microbatches": 2, "auto_partition": True})

        class Contrary(smp.DistributedModel):
            def __init__(self):
                super().__init__()
                self.blocks = [keras.layers.Dense(8) for _ in range(4)]

            def call(self, x):
                for i, block in enumerate(self.blocks):
                    with smp.partition(1 - i // 2):
                        x = block(x)
                return x

        model = Contrary()
        with caplog.at_level(logging.WARNING, logger="opensmp"):
            model(batch(4, 8))
            model(batch(2, 8))
            with smp.partition(1):
                pass
        lines = [r.getMessage() for r in caplog.records if "smp.partition" in r.getMessage()]
        assert len(lines) == 1
        assert "ignored because auto_partition is on" in lines[0]
        assert "'auto_partition': False" in lines[0]
        homes = [device_index(block.kernel.value) for block in model.blocks]
        assert homes == sorted(homes)
        assert set(homes) == {0, 1}

    def test_the_line_comes_again_for_another_configuration(self, smp_init, caplog):
        with caplog.at_level(logging.INFO, logger="opensmp"):
            for _ in range(2):
                smp_init({"partitions": 2})
                for _ in range(2):
                    with smp.partition(1):
                        pass
        assert sum("ignored" in r.getMessage() for r in caplog.records) == 2

    def test_a_wrong_index_is_an_error_all_the_same(self, smp_init):
        smp_init({"partitions": 2})
        with pytest.raises(PartitionError, match="there are 2 partitions"), smp.partition(2):
            pass


def test_contexts_of_one_thread_do_not_reach_another(smp_init):
    smp_init(THREE)
    found = []

    def build():
        inputs = keras.Input([4])
        model = smp.DistributedModel(inputs, keras.layers.Dense(4)(inputs))
        model(batch(2, 4))
        found.append(device_index(model.layers[1].kernel.value))

    with smp.partition(2):
        thread = threading.Thread(target=build)
        thread.start()
        thread.join()
    assert found == [0]
