from __future__ import annotations

import json
import logging
import math
import os
import signal

import keras
import numpy as np
import pytest
import tensorflow as tf
from processes import check_ranks, run_ranks
from small import STEP_OF_TWO, TWO_BY_FOUR, Net, batch

import opensmp as smp
from opensmp.cli.reporting.findings import Findings
from opensmp.cli.reporting.measured_step import measured_steps
from opensmp.cli.reporting.run_folder import read_runs
from opensmp.compiler.plan.plan import Plan
from opensmp.errors import NotInitializedError, SavingError, StepError
from opensmp.execution.profiling import timestamps

LABELS = tf.constant([0, 1, 2, 0, 1, 2, 0, 1])
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
ROWS = np.random.default_rng(0).normal(size=(40, 5)).astype("float32")
CLASSES = (np.arange(40) % 3).astype("int32")


def compiled(**given):
    keras.utils.set_random_seed(3)
    model = Net(**given)
    model.compile(keras.optimizers.SGD(0.1), LOSS, metrics=["accuracy"])
    return model


def fit(model, callbacks=(), **given):
    given = {"batch_size": 8, "epochs": 2, "verbose": 0, **given}
    return model.fit(ROWS, CLASSES, callbacks=list(callbacks), **given)


def only(folder):
    (run,) = read_runs(folder)
    return run


@pytest.fixture
def two(smp_init):
    smp_init(TWO_BY_FOUR)


# --- in fit ----------------------------------------------------------------------------------


def test_fit_with_a_report_computes_the_same_bits(two, tmp_path):
    plain, reported = compiled(), compiled()
    first = fit(plain).history
    second = fit(reported, [smp.RunReport(tmp_path)]).history
    assert first == second
    for a, b in zip(plain.get_weights(), reported.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_fit_writes_steps_epochs_plan_memory_and_timeline(two, tmp_path):
    model = compiled()
    history = fit(model, [smp.RunReport(tmp_path)], validation_split=0.2).history
    run = only(tmp_path)
    first = run.first
    assert sum(step.num_steps for step in first.steps) == first.steps[-1].last == 8
    assert sum(step.examples for step in first.steps) == 2 * 32
    assert [epoch.values["loss"] for epoch in first.epochs] == history["loss"]
    assert [epoch.values["val_loss"] for epoch in first.epochs] == history["val_loss"]
    assert {m.partition for m in first.memory} == {0, 1}
    assert [t.step for t in first.timelines] == [2, 3, 4]
    assert first.end is not None
    assert first.end.error == ""
    assert [step.warm for step in first.steps][:2] == [False, True]
    plan = Plan.load(run.plans[0])
    assert list(plan.layers.values()) == list(model.plan.layers.values())
    assert not timestamps.has_listeners()


def test_timeline_of_fit_has_each_pass_of_each_microbatch(two, tmp_path):
    fit(compiled(), [smp.RunReport(tmp_path)])
    step = measured_steps(only(tmp_path))[0]
    forward = sorted(
        (e.action.segment, e.action.microbatch) for e in step.events if e.action.kind == "F"
    )
    assert forward == [(segment, micro) for segment in range(2) for micro in range(4)]
    assert {(row.replica, row.partition) for row in step.rows} == {(0, 0), (0, 1)}
    assert 0 < step.bubble < 1


def test_what_a_verdict_needs_is_there(two, tmp_path):
    fit(compiled(), [smp.RunReport(tmp_path)])
    run = only(tmp_path)
    found = Findings(run, {"net": Plan.load(run.plans[0])}, run.first.time)
    assert found.simulated_with == "measured"
    assert found.handover is not None
    text = " ".join(sentence.text for sentence in found.verdict)
    assert "simulated with the measured times of passes" in text
    assert found.state == "finished"


def test_a_second_fit_goes_on_with_the_run(two, tmp_path):
    model, report = compiled(), smp.RunReport(tmp_path)
    fit(model, [report])
    fit(model, [report], epochs=1)
    first = only(tmp_path).first
    assert first.steps[-1].last == 15
    assert len(first.epochs) == 3
    assert first.end is not None


def test_another_report_of_the_folder_is_another_run(two, tmp_path):
    model = compiled()
    for _ in range(2):
        fit(model, [smp.RunReport(tmp_path)], epochs=1)
    assert len(read_runs(tmp_path)) == 2


def test_steps_that_keras_runs_together_are_counted_and_measured_apart(two, tmp_path):
    keras.utils.set_random_seed(3)
    model = Net()
    model.compile(keras.optimizers.SGD(0.1), LOSS, steps_per_execution=2)
    fit(model, [smp.RunReport(tmp_path)], epochs=3)
    first = only(tmp_path).first
    assert first.steps[-1].last == 15
    assert sum(step.examples for step in first.steps) == 3 * 40
    steps = [t.step for t in first.timelines]
    assert len(steps) == len(set(steps)) >= 3


def test_an_error_that_ends_fit_is_written_and_nothing_is_measured_any_more(two, tmp_path):
    class Stop(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 3:
                raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        fit(compiled(), [smp.RunReport(tmp_path), Stop()])
    end = only(tmp_path).first.end
    assert end.error == "RuntimeError: enough"
    assert not timestamps.has_listeners()


def test_losses_that_are_not_numbers_are_written(two, tmp_path):
    model = compiled()
    model.fit(
        ROWS * math.nan, CLASSES, batch_size=8, verbose=0, callbacks=[smp.RunReport(tmp_path)]
    )
    assert all(math.isnan(step.values["loss"]) for step in only(tmp_path).first.steps)


def test_a_run_without_timeline_is_not_traced_again(two, tmp_path):
    plain, model = compiled(), compiled()
    fit(plain)
    fit(model, [smp.RunReport(tmp_path, timeline_steps=0)])
    assert model.train_function.tracing_count == plain.train_function.tracing_count
    assert only(tmp_path).first.timelines == []


def test_a_training_step_of_ones_own_is_reported_without_timeline(two, tmp_path):
    class Own(Net):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = LOSS(y, self(x, training=True))
            weights = self.trainable_variables
            self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
            return {"loss": loss}

    model = Own()
    model.compile("sgd")
    fit(model, [smp.RunReport(tmp_path)])
    first = only(tmp_path).first
    assert first.steps[-1].last == 10
    assert first.timelines == []


# --- in a loop -------------------------------------------------------------------------------


def loop():
    keras.utils.set_random_seed(1)
    model = Net()
    optimizer = keras.optimizers.SGD(0.1)

    @smp.step
    def forward_backward(x, y):
        with tf.GradientTape() as tape:
            loss = LOSS(y, model(x, training=True))
        return tape.gradient(loss, model.trainable_variables), loss

    @tf.function
    def train_step(x, y):
        gradients, loss = forward_backward(x, y)
        gradients = [gradient.accumulate() for gradient in gradients]
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss.reduce_mean()

    return train_step, forward_backward


def test_a_loop_writes_its_steps_and_timeline(two, tmp_path):
    train_step, _ = loop()
    losses = []
    with smp.RunReport(tmp_path, timeline_steps=2) as report:
        for _ in range(12):
            loss = train_step(batch(), LABELS)
            losses.append(float(loss))
            report.step(loss=loss, examples=8, rate=np.float32(0.5))
    first = only(tmp_path).first
    assert first.steps[-1].last == 12
    assert sum(step.examples for step in first.steps) == 96
    known = {step.last: step.values["loss"] for step in first.steps}
    assert all(losses[last - 1] == pytest.approx(value) for last, value in known.items())
    assert first.steps[-1].values["rate"] == 0.5
    assert [t.step for t in first.timelines] == [2, 3]
    assert first.timelines[0].name == "forward_backward"
    assert not timestamps.has_listeners()


def test_an_error_within_the_block_is_written_and_raised(two, tmp_path):
    train_step, _ = loop()

    def run():
        with smp.RunReport(tmp_path) as report:
            for _ in range(3):
                report.step(loss=train_step(batch(), LABELS))
            raise KeyError("x")

    with pytest.raises(KeyError):
        run()
    first = only(tmp_path).first
    assert first.end.error == "KeyError: 'x'"
    assert not timestamps.has_listeners()


def test_without_a_block_the_run_ends_with_close(two, tmp_path):
    train_step, _ = loop()
    report = smp.RunReport(tmp_path, timeline_steps=0)
    report.step(loss=train_step(batch(), LABELS))
    assert only(tmp_path).first.end is None
    report.close()
    assert only(tmp_path).first.end is not None
    report.step(loss=1.0)
    report.close()
    assert only(tmp_path).first.steps[-1].last == 2


def test_values_that_are_no_numbers_are_refused_all_at_once(two, tmp_path):
    _, forward_backward = loop()
    _, loss = forward_backward(batch(), LABELS)
    report = smp.RunReport(tmp_path)
    with pytest.raises(StepError) as caught:
        report.step(loss=loss, name="a", many=[1, 2], examples=-1)
    text = str(caught.value)
    for part in ("loss.reduce_mean()", "name: expected", "many: expected", "examples: expected"):
        assert part in text


# --- arguments and files ---------------------------------------------------------------------


def test_wrong_arguments_are_refused_all_at_once():
    with pytest.raises(StepError) as caught:
        smp.RunReport(3, timeline_steps=True, tensorboard="yes")
    text = str(caught.value)
    for part in ("1. folder", "2. timeline_steps", "3. tensorboard"):
        assert part in text
    with pytest.raises(StepError, match="local disk"):
        smp.RunReport("gs://bucket/run")


def test_without_init_it_is_refused(smp_init, tmp_path):
    smp_init(TWO_BY_FOUR)
    smp.shutdown()
    with pytest.raises(NotInitializedError, match=r"smp\.RunReport"):
        smp.RunReport(tmp_path).step(loss=1.0)


def test_a_folder_that_cannot_be_made_is_refused_at_once(two, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SavingError), smp.RunReport(tmp_path / "file" / "run"):
        pass


def test_training_goes_on_if_the_folder_cannot_be_written_any_more(
    two, tmp_path, monkeypatch, caplog
):
    def full(*args):
        raise OSError(28, "No space left on device")

    model = compiled()
    report = smp.RunReport(tmp_path)
    fit(model, [report], epochs=1)
    monkeypatch.setattr("opensmp.execution.profiling.run_files.RunFile.append", full)
    with caplog.at_level(logging.WARNING, "opensmp"):
        fit(model, [report])
    told = [r for r in caplog.records if "cannot be written" in r.getMessage()]
    assert len(told) == 1
    assert "No space left" in told[0].getMessage()


def test_secrets_of_the_command_line_are_not_written(two, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/home/me/train.py", "--key", "sesame"])
    with smp.RunReport(tmp_path):
        pass
    (path,) = tmp_path.glob("*.jsonl")
    assert "sesame" not in path.read_text()
    assert only(tmp_path).first.head["environment"]["script"] == "train.py"


# --- TensorBoard -----------------------------------------------------------------------------


def test_the_same_numbers_are_written_for_tensorboard(two, tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs TensorBoard"
    )
    history = fit(compiled(), [smp.RunReport(tmp_path, tensorboard=True)]).history
    run = only(tmp_path)
    folder = tmp_path / "tensorboard" / run.name / "rank0"
    events = event_accumulator.EventAccumulator(str(folder), {"tensors": 0})
    events.Reload()
    tags = events.Tags()["tensors"]
    for partition in (0, 1):
        for name in ("busy_fraction", "forward_seconds", "backward_seconds", "peak_bytes"):
            assert f"partition_{partition}/{name}" in tags

    def values(tag):
        return [(e.step, float(tf.make_ndarray(e.tensor_proto))) for e in events.Tensors(tag)]

    assert values("epoch/loss") == pytest.approx(
        [((epoch + 1) * 5, np.float32(loss)) for epoch, loss in enumerate(history["loss"])]
    )
    assert [step for step, _ in values("step_seconds")] == list(range(1, 11))
    busy = dict(values("partition_0/busy_fraction"))
    assert list(busy) == [3, 4, 5]
    assert all(0 < share < 1 for share in busy.values())
    trace = json.loads((folder / "timeline.trace.json").read_text())
    names = [e["name"] for e in trace["traceEvents"] if e["ph"] == "X" and e["cat"] == "forward"]
    assert names.count("0F0") == 3


# --- several processes -----------------------------------------------------------------------

RANK = f"""
import sys
import opensmp as smp
smp.init({TWO_BY_FOUR})
{STEP_OF_TWO}
with smp.RunReport(sys.argv[1]) as report:
    for number in range(8):
        _, loss = forward(tf.ones([8, 4]))
        report.step(loss=number, examples=8)
"""


def test_two_ranks_write_one_run(tmp_path):
    check_ranks(RANK, 2, args=[tmp_path])
    run = only(tmp_path)
    assert list(run.ranks) == [0, 1]
    assert run.size == 2
    (step, *_) = measured_steps(run)
    assert [(row.replica, row.partition) for row in step.rows] == [(0, 0), (0, 1)]
    ended = {(e.row.partition, e.action.text): e.end for e in step.events}
    began = {(e.row.partition, e.action.text): e.start for e in step.events}
    # The clocks of both are that of the machine: what is read was there before.
    assert all(ended[0, f"0F{m}"] <= began[1, f"1F{m}"] + 1e-3 for m in range(4))
    found = Findings(run, {"net": Plan.load(run.plans[0])}, run.first.time)
    assert found.state == "finished"
    assert [m.rank for rank in run.ranks.values() for m in rank.memory] == [0, 1]


def test_a_killed_run_leaves_what_it_has_measured(tmp_path):
    script = RANK.replace(
        "report.step(", "number == 7 and os.kill(os.getpid(), signal.SIGKILL)\n        report.step("
    ).replace("import sys", "import os, signal, sys")
    (result,) = run_ranks(script, 1, args=[tmp_path], fresh=True)
    assert result.code == -signal.SIGKILL
    run = only(tmp_path)
    assert run.first.end is None
    assert run.first.steps[-1].last >= 5
    assert len(run.first.timelines) == 3
    found = Findings(run, {}, run.first.time + 3600)
    assert "killed" in found.state
    assert os.listdir(tmp_path)
