from __future__ import annotations

import functools
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from processes import environ_of_tests, launch
from turns import in_turn

import opensmp as smp
from opensmp.distributed.watchdog import preemption
from opensmp.errors import CheckpointError, StepError

PROGRAM = Path(__file__).with_name("resumed.py")
PREEMPTED = 143


def program(folder, mode, cut, environ):
    return subprocess.run(
        [sys.executable, PROGRAM, str(folder), mode, cut],
        env=environ_of_tests(environ),
        timeout=500,
        capture_output=True,
        text=True,
    )


def result_of(output: str) -> str:
    return next(line for line in output.splitlines() if "RESULT" in line).partition("RESULT ")[2]


def undisturbed(mode: str, environ: Mapping[str, str]) -> str:
    """The result of one process that is never ended, and saves nothing."""
    what = {
        name: value for name, value in environ.items() if name in ("DATA", "EXECUTION", "STEPS")
    }
    return _undisturbed("loop" if mode == "loop" else "plain", tuple(sorted(what.items())))


@functools.cache
def _undisturbed(mode: str, environ: tuple[tuple[str, str], ...]) -> str:
    with tempfile.TemporaryDirectory() as made:
        done = program(made, mode, "never", dict(environ))
    assert done.returncode == 0, done.stderr
    return result_of(done.stdout)


CASES = {
    "before the first batch": ("fit", "TERM:epoch:1", {"SLOW": "0.3"}),
    "within an epoch": ("fit", "TERM:train:9", {}),
    "within validation": ("fit", "TERM:test:1", {}),
    "while the first step is traced": ("fit", "TERM:train:1", {}),
    "after the last batch of an epoch": ("fit", "TERM:trained:6", {}),
    "between epochs": ("fit", "TERM:epoch_end:2", {}),
    "twice": ("fit", "TERM:train:9*2", {}),
    "several batches at once": ("fit", "TERM:train:5", {"EXECUTION": "2"}),
    "in the background": ("fit", "TERM:train:9", {"BACKGROUND": "1"}),
    "a dataset that shuffles": ("fit", "TERM:train:9", {"DATA": "dataset"}),
    "data of unknown length": ("fit", "TERM:train:14", {"DATA": "unknown"}),
    "unknown length, last batch": ("fit", "TERM:test:1", {"DATA": "unknown"}),
    "data without an end": ("fit", "TERM:train:7", {"DATA": "endless"}),
    "killed, every third batch saved": ("fit", "KILL:train:9", {"FREQ": "3"}),
    "backup, killed in the second epoch": ("backup", "KILL:train:9", {}),
    "backup within an epoch": ("backup", "KILL:train:9", {"FREQ": "2"}),
    "backup at the end of an epoch": ("backup", "KILL:test:1", {"FREQ": "2"}),
    "loop": ("loop", "TERM:train:7", {}),
    "loop in the background": ("loop", "TERM:trained:7", {"BACKGROUND": "1"}),
}


@pytest.mark.parametrize("case", in_turn(CASES, 7))
def test_training_goes_on_with_the_same_bits(case, tmp_path):
    mode, cut, environ = CASES[case]
    ended = program(tmp_path, mode, cut, environ)
    assert ended.returncode == (PREEMPTED if "TERM" in cut else -signal.SIGKILL), ended.stderr
    again = program(tmp_path, mode, "never", environ)
    assert again.returncode == 0, again.stderr
    assert result_of(again.stdout) == undisturbed(mode, environ)


TWICE = {
    "fit": "TERM:train:9@1,TERM:train:3@1",
    "loop": "TERM:train:7@1,TERM:train:3@1",
    "backup": "KILL:train:9@1,KILL:train:4@1",
}


@pytest.mark.parametrize("mode", in_turn(TWICE, 3))
def test_two_ranks_go_on_twice_with_the_bits_of_one_process(mode, tmp_path):
    """The second time shows what the first restore has left in the rank that does not change it."""
    environ = {"FREQ": "2"} if mode == "backup" else {}
    result = launch(
        str(PROGRAM),
        ["-n", "2", "--max-restarts", "2"],
        args=[tmp_path, mode, TWICE[mode]],
        environ=environ,
    )
    assert result.code == 0, result.stderr
    assert "restart 2 of 2: all ranks are started again" in result.stderr
    assert result_of(result.stdout) == undisturbed(mode, environ)


TEN = {
    "fit": [
        "TERM:trace:1@1",  # while the first step is traced
        "TERM:during:2",  # at some moment of a step
        "TERM:save:1@01",  # while both ranks write their parts of a checkpoint
        "TERM:train:2@1*2",  # twice in a row
        "TERM:test:1",  # in validation
        "TERM:epoch_end:1@1",  # between epochs
        "TERM:epoch:1",
        "TERM:trained:1@1",
        "TERM:during:2@01",
        "TERM:test:2@1",
    ],
    "loop": [
        "TERM:trace:1@1",
        "TERM:during:2",
        "TERM:save:1@01",
        "TERM:train:2@1*2",
        "TERM:trained:2",
        "TERM:during:3@1",
        "TERM:save:1@1",
        "TERM:trained:1",  # before the first call, where it ends the program as ever
        "TERM:train:2@01*2",
        "TERM:during:2@01",
    ],
}


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("mode", TEN)
def test_ten_signals_at_all_moments_leave_the_bits_of_one_process(mode, tmp_path):
    environ = {"SLOW": "0.2", "STEPS": "30", "FREQ": "2"}
    result = launch(
        str(PROGRAM),
        ["-n", "2", "--max-restarts", "20"],
        args=[tmp_path, mode, ",".join(TEN[mode])],
        environ=environ,
        seconds=1200,
    )
    assert result.code == 0, result.stderr
    sent = (tmp_path / "sent.txt").read_text().splitlines()
    assert len(sent) == sum(2 if "@01" in cut else 1 for cut in TEN[mode]), sent
    assert result.stderr.count("restart ") == 10, result.stderr
    assert result_of(result.stdout) == undisturbed(mode, environ)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("partitions", ["2", "4"], ids=["replicas", "partitions"])
def test_two_of_four_ranks_train_on_after_one_is_lost(partitions, tmp_path):
    """Two replicas become one, or four partitions come to lie in two ranks."""
    environ = {"MODEL": "dense", "PARTITIONS": partitions, "FREQ": "3"}
    done = program(tmp_path / "alone", "plain", "never", environ)
    assert done.returncode == 0, done.stderr
    result = launch(
        str(PROGRAM),
        ["-n", "4", "--max-restarts", "3", "--min-procs", "2"],
        args=[tmp_path / "four", "fit", "KILL:train:9@3"],
        environ=environ,
        seconds=600,
    )
    assert result.code == 0, result.stderr
    assert "rank 3 lost: 2 of 4 ranks are started again" in result.stderr
    found, expected = (np.load(tmp_path / folder / "weights.npz") for folder in ("four", "alone"))
    assert len(found.files) == len(expected.files) == 8
    apart = max(np.abs(found[name] - expected[name]).max() for name in found.files)
    print(f"largest difference {apart:.1e}\n{result_of(result.stdout)}\n{result_of(done.stdout)}")
    # Two replicas add up the examples of a batch in another order; Adam makes more of it.
    assert apart < 1e-5 if partitions == "2" else apart == 0.0


STUCK = """
import os, signal, time
import opensmp as smp
import tensorflow as tf
smp.init({"partitions": 1})
manager = smp.CheckpointManager(tf.train.Checkpoint(v=tf.Variable(1.0)), "checkpoints")
smp.checkpoint_on_preemption(manager, seconds=1.0)
if smp.rank() == 1:
    os.kill(os.getpid(), signal.SIGTERM)
    smp.checkpoint_on_preemption(manager, seconds=1.0)
time.sleep(3000)
"""


def test_a_rank_that_runs_no_further_step_is_ended_and_all_with_it():
    result = launch(STUCK, ["-n", "2"])  # the program sleeps for longer
    assert result.code in (PREEMPTED, 75)
    assert "within 1 s no step ended" in result.stderr


@pytest.fixture
def manager(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    yield smp.CheckpointManager(tf.train.Checkpoint(v=tf.Variable(1.0)), str(tmp_path))
    signal.signal(signal.SIGTERM, before)
    preemption._handled.clear()


def test_all_faults_of_the_arguments_are_told_at_once():
    with pytest.raises(CheckpointError) as caught:
        smp.CheckpointOnPreemption("folder", "batch", signals=[signal.SIGKILL], seconds=0)
    for part in ("smp.CheckpointManager; received 'folder'", "SIGKILL", "seconds", "'batch'"):
        assert part in str(caught.value)
    with pytest.raises(CheckpointError, match=r"smp\.checkpoint_on_preemption: manager must be"):
        smp.checkpoint_on_preemption(None)


def test_a_checkpoint_is_saved_though_its_interval_has_not_passed(manager, tmp_path, monkeypatch):
    smp.shutdown()
    smp.init({"partitions": 1})
    step = tf.Variable(7, dtype=tf.int64)
    sparing = smp.CheckpointManager(
        tf.train.Checkpoint(step=step), str(tmp_path), step_counter=step, checkpoint_interval=100
    )
    assert sparing.save() is not None
    assert sparing.save() is None
    stopping = preemption.Preemption()
    monkeypatch.setattr(stopping, "arrive", lambda: "SIGTERM")
    monkeypatch.setattr(preemption, "_preemption", stopping)
    with pytest.raises(SystemExit) as ended:
        smp.checkpoint_on_preemption(sparing)
    assert ended.value.code == PREEMPTED
    assert len(sparing.checkpoints) == 2


def test_it_is_refused_in_a_function_that_is_traced(manager):
    with pytest.raises(StepError, match="after each step"):
        tf.function(lambda: smp.checkpoint_on_preemption(manager))()


def test_it_is_refused_on_another_thread(manager):
    errors: list[Exception] = []

    def call():
        try:
            smp.checkpoint_on_preemption(manager)
        except StepError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join(60)
    assert "main thread only" in str(errors[0])


def test_a_checkpoint_without_the_optimizer_is_refused(manager):
    smp.shutdown()
    smp.init({"partitions": 1})
    model = smp.DistributedModel.from_keras(
        keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    )
    model.compile("sgd", "mse")
    with pytest.raises(CheckpointError, match="has not the model that is trained"):
        model.fit(
            np.ones((4, 2)),
            np.ones(4),
            verbose=0,
            callbacks=[smp.CheckpointOnPreemption(manager)],
        )
    plain = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    plain.compile("sgd", "mse")
    callbacks = [smp.CheckpointOnPreemption(manager)]
    with pytest.raises(CheckpointError, match=r"is for model\.fit of an smp\.DistributedModel"):
        plain.fit(np.ones((4, 2)), np.ones(4), verbose=0, callbacks=callbacks)
