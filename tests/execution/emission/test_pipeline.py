from __future__ import annotations

import importlib
import itertools
import weakref
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from small import MANUAL, TWO_BY_FOUR, TWO_BY_TWO, Net, Scale, Wrapped, batch

import opensmp as smp
from opensmp.compiler.schedule.actions import Action
from opensmp.compiler.schedule.regular.pipeline import RegularPipeline
from opensmp.errors import ScheduleError, StepError
from opensmp.execution.context import current_runner
from opensmp.execution.emission.pipeline import Pipeline


def graph_of(step: Any, *args: Any) -> Any:
    """The graph of a step for such arguments."""
    return step.get_concrete_function(*args).graph


def calls_of(graph: Any) -> dict[str, Any]:
    """Emitted calls by the text of their action."""
    found = [op for op in graph.get_operations() if op.type == "PartitionedCall"]
    return {op.name.rsplit("smp_", 1)[1]: op for op in found}


def training_step(model: Any) -> Any:
    @smp.step
    def backward(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(model(x, training=True)))
        return loss, tape.gradient(loss, model.trainable_variables)

    return backward


class TestEmission:
    def test_one_call_per_segment_pass_and_microbatch_on_the_device_of_its_partition(
        self, smp_init
    ):
        smp_init(TWO_BY_FOUR)
        calls = calls_of(graph_of(training_step(Net()), batch(8)))
        # The first segment has no gradients of inputs, to be sent before those of its weights.
        expected = [f"{kind}{m}" for kind in ("0F", "0B", "1F", "1B", "1W") for m in range(4)]
        assert sorted(calls) == sorted(expected)
        for text, op in calls.items():
            assert op.device.endswith(f"CPU:{text[0]}")

    def test_all_microbatches_call_the_same_functions(self, smp_init):
        smp_init(TWO_BY_FOUR)
        calls = calls_of(graph_of(training_step(Net()), batch(8)))
        for segment, kind in itertools.product("01", "FB"):
            functions = {calls[f"{segment}{kind}{m}"].get_attr("f").name for m in range(4)}
            assert len(functions) == 1

    def test_segments_of_several_models_and_calls_are_numbered_apart(self, smp_init):
        smp_init(TWO_BY_TWO)
        first, second = Net(units=5), Scale(partition=0)

        @smp.step
        def forward(x):
            return second(first(first(x)))

        calls = calls_of(graph_of(forward, batch(4)))
        assert sorted(calls) == sorted(f"{s}F{m}" for s in range(5) for m in range(2))
        assert [int(calls[f"{s}F0"].device[-1]) for s in range(5)] == [0, 1, 0, 1, 0]

    def test_a_pass_that_nothing_needs_is_no_part_of_the_schedule(self, smp_init):
        smp_init(TWO_BY_TWO)
        model, idle = Net(), Net()

        @smp.step
        def forward(x):
            idle(x)
            return model(x)

        forward(batch(4))
        scheduled = {action for order in forward.schedule.orders for action in order}
        assert len(scheduled) == 4

    def test_a_frozen_partition_has_no_backward_pass(self, smp_init):
        smp_init(TWO_BY_TWO)
        model = Net()
        model(batch(4))
        model.hidden.trainable = False
        calls = calls_of(graph_of(training_step(model), batch(4)))
        assert sorted(calls) == ["0F0", "0F1", "1B0", "1B1", "1F0", "1F1"]

    def test_a_second_gradient_of_a_persistent_tape_is_a_second_call(self, smp_init):
        smp_init(TWO_BY_TWO)
        model = Net()

        @smp.step
        def backward(x):
            with tf.GradientTape(persistent=True) as tape:
                y = model(x)
                losses = tf.reduce_sum(y), tf.reduce_sum(tf.square(y))
            return [tape.gradient(loss, model.trainable_variables) for loss in losses]

        calls = calls_of(graph_of(backward, batch(4)))
        assert {"0B0", "0B0.1", "1B0", "1B0.1"} <= set(calls)

    def test_gradients_of_inputs_without_a_tape_run_the_forward_pass_again_only_if_used(
        self, smp_init
    ):
        smp_init(TWO_BY_TWO)
        model = Net()

        def step(targets: Any) -> Any:
            @smp.step
            def backward(x):
                return tf.gradients(tf.reduce_sum(tf.square(model(x))), targets(x))

            return backward

        model(batch(4))
        weights = step(lambda x: [v.value for v in model.trainable_variables])
        inputs = step(lambda x: [x])
        assert not any("R" in text for text in calls_of(graph_of(weights, batch(4))))
        assert {"0R0", "1R0"} & set(calls_of(graph_of(inputs, batch(4)))) != set()


class TestOrder:
    @pytest.mark.parametrize("pipeline", ["simple", "interleaved"])
    def test_every_device_is_held_to_its_order_by_control_edges(self, smp_init, pipeline):
        smp_init({**TWO_BY_FOUR, "pipeline": pipeline})
        step = training_step(Net())
        calls = calls_of(graph_of(step, batch(8)))
        for order in step.schedule.orders:
            for before, after in itertools.pairwise(order):
                assert calls[before.text] in calls[after.text].control_inputs

    @pytest.mark.parametrize("pipeline", ["zb_v", "v_half", "v_min", "dualpipe_v"])
    def test_model_in_a_v_runs_in_the_order_of_the_arrays(self, smp_init, pipeline):
        smp_init({**TWO_BY_FOUR, "pipeline": pipeline, "auto_partition": True})
        inputs = keras.Input((4,))
        x = inputs
        for _ in range(8):
            x = keras.layers.Dense(4, activation="tanh")(x)
        step = training_step(smp.DistributedModel(inputs, x))
        graph_of(step, tf.ones([8, 4]))
        passes = importlib.import_module(f"opensmp.compiler.schedule.methods.{pipeline}").passes
        regular = RegularPipeline(2, 4, 2, "v").schedule(pipeline, passes).schedule()
        # Partition 1 runs its two pieces, which follow each other, as one segment; the backward
        # pass of the first segment is not split.
        turned = {"0F": "0F", "0B": "0B", "1F": "1F", "1B": "1B", "1W": "1W"}
        turned |= {f"3{kind}": f"2{kind}" for kind in "FBW"}
        expected = [
            [turned[a.text[:2]] + a.text[2:] for a in order if a.text[:2] in turned]
            for order in regular.orders
        ]
        assert [[a.text for a in order] for order in step.schedule.orders] == expected

    def test_order_of_a_users_own_is_that_of_the_calls(self, smp_init):
        def newest_first(graph):
            orders = []
            for device in range(graph.num_devices):
                forward = [f"{device}F{m}" for m in graph.microbatches]
                trains = any(action.kind == "B" for action in graph.device)
                backward = [f"{device}B{m}" for m in reversed(graph.microbatches)]
                orders.append(forward + backward * trains)
            return orders

        smp_init({**TWO_BY_FOUR, "pipeline": newest_first})
        model = Net()
        step = training_step(model)
        step(batch(8))
        texts = [[action.text for action in order] for order in step.schedule.orders]
        assert texts[0] == ["0F0", "0F1", "0F2", "0F3", "0B3", "0B2", "0B1", "0B0"]
        assert texts[1][4:] == ["1B3", "1W3", "1B2", "1W2", "1B1", "1W1", "1B0", "1W0"]
        assert model(batch(2)).shape[0] == 2  # a call outside of a step is one microbatch

    def test_order_of_a_users_own_that_does_not_fit_is_refused(self, smp_init):
        smp_init({**TWO_BY_FOUR, "pipeline": lambda graph: [["0F0"], ["1F0"]]})
        with pytest.raises(ScheduleError, match="missing: 0F1 is in no order"):
            graph_of(training_step(Net()), batch(8))

    def test_automatic_schedule_knows_the_costs_of_the_plan(self, smp_init):
        smp_init({**TWO_BY_FOUR, "pipeline": "auto"})
        step = training_step(Net())
        graph_of(step, batch(8))
        assert step.schedule.name == "auto"
        seconds = step.schedule.graph.seconds
        assert 0 < seconds[Action.parse("0F0")] < 1e-2

    def test_microbatches_in_flight_are_bounded(self, smp_init):
        smp_init({**TWO_BY_FOUR, "active_microbatches": 1})
        step = training_step(Net())
        step(batch(8))
        first = [action.text for action in step.schedule.orders[0]]
        assert first == ["0F0", "0B0", "0F1", "0B1", "0F2", "0B2", "0F3", "0B3"]

    def test_user_code_between_microbatches_is_respected(self, smp_init):
        """A running sum ties the microbatches together; the schedule must not contradict it."""
        smp_init(TWO_BY_FOUR)
        model = Scale(2.0)
        total = tf.Variable(0.0, trainable=False)

        @smp.step
        def forward(x):
            y = model(x + total)
            total.assign_add(tf.reduce_sum(y))
            return y

        y = forward(tf.ones([4, 1]))
        assert y.merge().numpy().tolist() == [[2.0], [6.0], [18.0], [54.0]]
        assert float(total) == 80.0


class TestState:
    def test_each_microbatch_sees_the_state_that_the_one_before_left(self, smp_init):
        smp_init(TWO_BY_FOUR)

        class Counts(smp.DistributedModel):
            def __init__(self):
                super().__init__()
                self.count = self.add_weight(shape=(), initializer="zeros", trainable=False)

            def call(self, x):
                self.count.assign_add(1.0)
                with smp.partition(1):
                    return x + self.count

        model = Counts()

        @smp.step
        def forward(x):
            return model(x)

        for start in (0, 4, 8):
            y = forward(tf.zeros([4])).merge().numpy().tolist()
            assert y == [start + 1, start + 2, start + 3, start + 4]

    def test_state_is_assigned_once_a_step(self, smp_init):
        smp_init(TWO_BY_FOUR)
        norm = keras.layers.BatchNormalization()
        model = smp.DistributedModel.from_keras(keras.Sequential([norm]))
        model(batch(8))
        graph = graph_of(training_step(model), batch(8))
        assigned = [op for op in graph.get_operations() if op.type == "AssignVariableOp"]
        assert len(assigned) == 2


class TestResults:
    def test_results_stay_on_the_device_that_made_them(self, smp_init):
        smp_init({**MANUAL, "partitions": 3, "microbatches": 2})
        model = Scale(partition=2)

        @smp.step
        def forward(x):
            return model(x)

        assert {t.backing_device[-1] for t in forward(batch(4))} == {"2"}
        assert {t.device[-1] for t in graph_of(forward, batch(4)).outputs} == {"2"}

    def test_with_side_effects_as_well(self, smp_init, capfd):
        smp_init({**MANUAL, "partitions": 3, "microbatches": 2})

        def call(model, x):
            tf.print("ran")
            return x * model.weight

        model = Wrapped(call, partition=2)

        @smp.step
        def forward(x):
            return model(x)

        assert {t.backing_device[-1] for t in forward(batch(4))} == {"2"}
        assert capfd.readouterr().err.count("ran") == 2
        assert {t.device[-1] for t in graph_of(forward, batch(4)).outputs} == {"2"}

    def test_nothing_to_run_is_an_error(self, smp_init):
        world = smp_init(TWO_BY_TWO)

        @tf.function
        def run(x):
            pipeline = Pipeline(world, 1)
            with pipeline.tracing():
                y = x + 1.0
            return pipeline.finish([y])

        with pytest.raises(StepError, match="No DistributedModel was called"):
            run(tf.ones([2]))

    def test_a_nest_keeps_its_other_leaves(self, smp_init):
        world = smp_init(TWO_BY_TWO)
        model = Scale(3.0)
        model(tf.ones([2]))

        @tf.function
        def run(x):
            pipeline = Pipeline(world, 1)
            with pipeline.tracing():
                y = model(x)
            return pipeline.finish_nest({"y": y, "other": [None, x]})

        result = run(tf.ones([2]))
        assert result["y"].numpy().tolist() == [3.0, 3.0]
        assert result["other"][0] is None


class TestTracing:
    def test_the_pipeline_is_current_inside_only(self, smp_init):
        world = smp_init(TWO_BY_TWO)

        @tf.function
        def run(x):
            pipeline = Pipeline(world, 1)
            assert current_runner() is None
            with pipeline.tracing():
                assert current_runner() is pipeline
            assert current_runner() is None
            return x

        run(tf.ones([]))

    def test_a_fault_ends_it_too(self, smp_init):
        world = smp_init(TWO_BY_TWO)

        @tf.function(autograph=False)
        def run(x):
            with Pipeline(world, 1).tracing():
                raise KeyError

        with pytest.raises(KeyError):
            run(tf.ones([]))
        assert current_runner() is None

    def test_a_model_is_traced_once_for_all_microbatches(self, smp_init, monkeypatch):
        monkeypatch.setattr("opensmp.execution.models.registry._models", weakref.WeakSet())
        smp_init(TWO_BY_FOUR)
        calls = []

        def call(model, x):
            calls.append(x.shape.as_list())
            return x * model.weight

        model = Wrapped(call)

        @smp.step
        def forward(x):
            return model(x)

        model(batch(2, 5))
        calls.clear()
        forward(batch(8, 5))
        assert len(calls) == 1
        np.testing.assert_array_equal(forward(batch(8, 5)).merge(), batch(8, 5))
