from __future__ import annotations

import itertools
import json
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from patience import patient
from processes import check_ranks
from small import STEP_OF_TWO, TWO_BY_FOUR, Net, batch

import opensmp as smp
from opensmp.errors import StepError

LABELS = tf.constant([0, 1, 2, 0, 1, 2, 0, 1])
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class Training:
    """A step and a tf.function around it, of one model with fixed initial weights."""

    def __init__(self) -> None:
        keras.utils.set_random_seed(1)
        self.model = Net()
        optimizer = keras.optimizers.SGD(0.1)
        self.num_traces = 0

        @smp.step
        def forward_backward(x, y):
            with tf.GradientTape() as tape:
                loss = LOSS(y, self.model(x, training=True))
            return tape.gradient(loss, self.model.trainable_variables), loss

        @tf.function
        def train_step(x, y):
            self.num_traces += 1
            gradients, loss = forward_backward(x, y)
            gradients = [gradient.accumulate() for gradient in gradients]
            optimizer.apply_gradients(zip(gradients, self.model.trainable_variables, strict=True))
            return loss.reduce_mean()

        self.forward_backward, self.train_step = forward_backward, train_step


@pytest.fixture
def training(smp_init) -> Training:
    smp_init(TWO_BY_FOUR)
    return Training()


def record(function: Any, runs: int = 1) -> smp.Timeline:
    with smp.record_timeline() as timeline:
        for _ in range(runs):
            function(batch(), LABELS)
    return timeline


class TestEvents:
    def test_every_action_of_the_schedule_has_one_event(self, training):
        timeline = record(training.forward_backward, runs=2)
        expected = sorted(a for order in training.forward_backward.schedule.orders for a in order)
        assert len(expected) == 20  # the first partition has no gradients of inputs to hurry
        assert [sorted(e.action for e in step.events) for step in timeline.steps] == [expected] * 2

    def test_events_know_their_partition_device_step_and_name(self, training):
        timeline = record(training.forward_backward, runs=2)
        assert {(e.partition, e.device) for e in timeline.events} == {
            (0, "/device:CPU:0"),
            (1, "/device:CPU:1"),
        }
        assert [step.name for step in timeline.steps] == ["forward_backward"] * 2
        assert [e.step for e in timeline.steps[1].events] == [1] * 20

    def test_each_partition_runs_its_order_one_after_the_other(self, training):
        for step in record(training.forward_backward, runs=5).steps:
            for partition, order in enumerate(training.forward_backward.schedule.orders):
                events = [e for e in step.events if e.partition == partition]
                assert tuple(e.action for e in events) == order
                for before, after in itertools.pairwise(events):
                    assert before.start_seconds < before.end_seconds <= after.start_seconds

    def test_no_action_starts_before_what_it_needs_has_ended(self, training):
        for step in record(training.forward_backward, runs=5).steps:
            events = {e.action.text: e for e in step.events}
            for m in range(4):
                path = [events[f"0F{m}"], events[f"1F{m}"], events[f"1B{m}"], events[f"0B{m}"]]
                for before, after in itertools.pairwise(path):
                    assert before.end_seconds <= after.start_seconds

    def test_times_start_at_zero_and_steps_follow_one_another(self, training):
        first, second = record(training.forward_backward, runs=2).steps
        assert first.start_seconds == 0.0
        assert first.end_seconds <= second.start_seconds < 60.0

    def test_an_action_that_takes_long_has_a_long_event(self, smp_init):
        smp_init(TWO_BY_FOUR)
        model = Net()

        @smp.step
        def forward(x):
            return model(x)

        rows = tf.random.normal([4, 2_000_000])
        with smp.record_timeline() as timeline:
            for _ in range(3):
                forward(rows)
        # The shortest, because whatever else runs on the machine makes some longer.
        shortest = {
            segment: min(e.seconds for e in timeline.events if e.action.segment == segment)
            for segment in (0, 1)
        }
        assert shortest[0] > shortest[1]  # 8 million products against 12

    def test_work_that_no_result_needs_has_no_event(self, training):
        @smp.step
        def forward_only(x, y):
            with tf.GradientTape() as tape:
                loss = LOSS(y, training.model(x, training=True))
            tape.gradient(loss, training.model.trainable_variables)
            return loss

        kinds = [e.action.kind for e in record(forward_only).events]
        assert kinds == ["F"] * 8


class TestOtherTraces:
    def test_results_are_equal_with_and_without_stamps(self, smp_init):
        smp_init(TWO_BY_FOUR)
        plain, recorded = Training(), Training()
        expected = [float(plain.train_step(batch(), LABELS)) for _ in range(3)]
        losses = [float(recorded.train_step(batch(), LABELS))]
        with smp.record_timeline():
            losses += [float(recorded.train_step(batch(), LABELS)) for _ in range(2)]
        assert losses == expected
        for a, b in zip(plain.model.variables, recorded.model.variables, strict=True):
            np.testing.assert_array_equal(a.numpy(), b.numpy())

    def test_a_step_in_an_outer_function_is_measured(self, training):
        timeline = record(training.train_step, runs=3)
        assert len(timeline) == 3
        assert len(timeline.events) == 60

    def test_an_outer_function_traced_before_is_traced_once_more_and_no_more(self, training):
        training.train_step(batch(), LABELS)
        assert training.num_traces == 1
        assert len(record(training.train_step, runs=2)) == 2
        assert len(record(training.train_step)) == 1
        training.train_step(batch(), LABELS)
        assert training.num_traces == 2

    def test_the_plain_trace_of_a_step_stays(self, training):
        training.forward_backward(batch(), LABELS)
        record(training.forward_backward)
        training.forward_backward(batch(), LABELS)
        assert training.forward_backward.experimental_get_tracing_count() == 2

    def test_nothing_is_recorded_after_the_block(self, training):
        timeline = record(training.train_step)
        training.train_step(batch(), LABELS)
        training.forward_backward(batch(), LABELS)
        assert len(timeline) == 1

    def test_stamps_are_in_the_traces_of_the_block_only(self, training):
        with smp.record_timeline():
            training.train_step(batch(), LABELS)
            stamped = training.train_step.get_concrete_function(batch(), LABELS)
        plain = training.train_step.get_concrete_function(batch(), LABELS)
        assert any("read_clock" in name for name in _function_names(stamped.graph))
        assert not any("read_clock" in name for name in _function_names(plain.graph))

    def test_blocks_can_be_nested(self, training):
        with smp.record_timeline() as outer:
            training.train_step(batch(), LABELS)
            with smp.record_timeline() as inner:
                training.train_step(batch(), LABELS)
        assert (len(outer), len(inner)) == (2, 1)

    def test_two_steps_in_one_block_are_told_apart(self, training):
        @smp.step
        def evaluate(x, y):
            return LOSS(y, training.model(x, training=False))

        with smp.record_timeline() as timeline:
            training.forward_backward(batch(), LABELS)
            evaluate(batch(), LABELS)
        assert [step.name for step in timeline.steps] == ["forward_backward", "evaluate"]


def _function_names(graph: Any) -> list[str]:
    return [function.signature.name for function in graph.as_graph_def().library.function]


class TestMisuse:
    def test_a_block_without_a_step_is_an_error(self, training):
        message = r"no run of an smp\.step function was measured"
        with pytest.raises(StepError, match=message), smp.record_timeline():
            training.model(batch())

    def test_a_concrete_function_from_before_cannot_be_measured(self, training):
        fixed = training.train_step.get_concrete_function(batch(), LABELS)
        message = "a function from get_concrete_function"
        with pytest.raises(StepError, match=message), smp.record_timeline():
            fixed(batch(), LABELS)

    def test_an_error_in_the_block_is_what_is_raised(self, training):
        with pytest.raises(ZeroDivisionError), smp.record_timeline():
            _ = 1 / 0


def test_chrome_trace_of_a_real_step_has_all_its_events(training, tmp_path):
    timeline = record(training.train_step, runs=2)
    timeline.to_chrome_trace(tmp_path / "timeline.json")
    trace = json.loads((tmp_path / "timeline.json").read_text(encoding="utf-8"))
    names = sorted(
        e["name"] for e in trace["traceEvents"] if e["ph"] == "X" and e.get("cat") != "step"
    )
    assert names == sorted(e.action.text for e in timeline.events)


def test_a_real_step_is_drawn_with_a_row_per_device(training):
    lines = str(record(training.train_step, runs=2)).splitlines()
    assert lines[0].startswith("CPU:0 |F")  # F0, unless the machine paused in this step
    assert lines[1].startswith("CPU:1 |.")
    assert lines[-1] == "the last of 2 steps"


SEVERAL = f"""
import opensmp as smp

smp.init({{"partitions": 2, "microbatches": 3, "auto_partition": False, "default_partition": 0}})
{STEP_OF_TWO}
with smp.record_timeline() as timeline:
    for _ in range(2):
        forward(tf.ones([6, 4]))
step = timeline.steps[-1]
print({{event.partition for event in step.events}}, sorted(e.action.text for e in step.events))
print(list(step.busy_seconds), all(0 < e.seconds < step.makespan_seconds for e in step.events))
print(str(step).count("|") // 2, [bool(device) for device in step.devices])
"""


def test_in_several_processes_each_measures_its_own_partitions():
    with_warnings = {"TF_CPP_MIN_LOG_LEVEL": "1"}
    for rank, result in enumerate(check_ranks(SEVERAL, 2, environ=with_warnings)):
        kinds = sorted(f"{rank}{kind}{m}" for kind in ("FB", "FBW")[rank] for m in range(3))
        assert result.lines[-3] == f"{{{rank}}} {kinds}"
        assert result.lines[-2] == "['/device:CPU:0'] True"
        assert result.lines[-1] == f"1 {[rank == 0, rank == 1]}"
        assert "Failed to find definition" not in result.output


SLOW_FIRST = """
import sys
import time

SECONDS = float(sys.argv[1])

import opensmp as smp

smp.init({"partitions": 2, "microbatches": 3, "auto_partition": False, "default_partition": 0})
import keras
import tensorflow as tf

class Slow(keras.layers.Layer):
    def call(self, x):
        def slowly(value):
            time.sleep(SECONDS)
            return value
        y = tf.numpy_function(slowly, [x], tf.float32)
        y.set_shape(x.shape)
        return x + tf.stop_gradient(y)

x = inputs = keras.Input((4,))
for part in (0, 1):
    with smp.partition(part):
        x = keras.layers.Dense(4)(x if part else Slow()(x))
model = smp.DistributedModel.from_keras(keras.Model(inputs, x))

@smp.step
def step(x):
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(x, training=True))
    return tape.gradient(loss, model.trainable_variables), loss

with smp.record_timeline() as timeline:
    for _ in range(2):
        step(tf.ones([6, 4]))
last = timeline.steps[-1]
slowest = max(event.seconds for event in last.events)
print(last.makespan_seconds > 2 * SECONDS, last.bubble > 0.5, slowest > SECONDS)
"""


def test_a_process_that_waits_for_another_is_idle():
    # The first partition takes long for each of three microbatches, the second next to nothing.
    first, second = check_ranks(SLOW_FIRST, 2, args=[patient(0.2)])
    assert first.lines[-1] == "True False True"
    assert second.lines[-1] == "True True False"


def test_training_steps_of_keras_are_measured(smp_init):
    smp_init(TWO_BY_FOUR)
    model = Net()
    model.compile("sgd", LOSS)
    x, y = np.ones([16, 5], "float32"), np.zeros([16], "int32")
    model.fit(x, y, batch_size=8, verbose=0)
    with smp.record_timeline() as timeline:
        model.fit(x, y, batch_size=8, verbose=0)
    assert [step.name for step in timeline.steps] == ["fit", "fit"]
    forward = [e.action.microbatch for e in timeline.steps[0].events if e.action.kind == "F"]
    assert sorted(forward) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert timeline.steps[0].devices == ("/device:CPU:0", "/device:CPU:1")
