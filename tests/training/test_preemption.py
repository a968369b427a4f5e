from __future__ import annotations

import functools
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from processes import environ_of_tests, launch
from turns import in_turn

import opensmp as smp
from opensmp.errors import CheckpointError, StepError
from opensmp.runtime import preemption

PROGRAM = Path(__file__).with_name("resumed.py")
PREEMPTED = 143


def program(folder, mode, cut, environ):
    return subprocess.run(
        [sys.executable, PROGRAM, str(folder), mode, cut],
        env=environ_of_tests(environ),
        timeout=400,
        capture_output=True,
        text=True,
    )


def result_of(output: str) -> str:
    return next(line for line in output.splitlines() if "RESULT" in line).partition("RESULT ")[2]


@functools.cache
def undisturbed(mode: str, data: str, execution: str) -> str:
    with tempfile.TemporaryDirectory() as made:
        done = program(made, mode, "never", {"DATA": data, "EXECUTION": execution})
    assert done.returncode == 0, done.stderr
    return result_of(done.stdout)


CASES = {
    "within an epoch": ("fit", "TERM:train:9", {}),
    "within validation": ("fit", "TERM:test:1", {}),
    "while the first step is traced": ("fit", "TERM:train:1", {}),
    "after the last batch of an epoch": ("fit", "TERM:trained:6", {}),
    "between epochs": ("fit", "TERM:epoch_end:2", {}),
    "twice": ("fit", "TERM:train:9", {"CUT_TIMES": "2"}),
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


@pytest.mark.parametrize("case", in_turn(CASES, 3))
def test_training_goes_on_with_the_same_bits(case, tmp_path):
    mode, cut, environ = CASES[case]
    ended = program(tmp_path, mode, cut, environ)
    assert ended.returncode == (PREEMPTED if "TERM" in cut else -signal.SIGKILL), ended.stderr
    again = program(tmp_path, mode, "never", environ)
    assert again.returncode == 0, again.stderr
    alone = "loop" if mode == "loop" else "plain"
    expected = undisturbed(alone, environ.get("DATA", "arrays"), environ.get("EXECUTION", "1"))
    assert result_of(again.stdout) == expected


@pytest.mark.parametrize("mode", in_turn(["fit", "loop", "backup"], 1))
def test_two_ranks_go_on_with_the_bits_of_one_process(mode, tmp_path):
    cut = "KILL:train:9" if mode == "backup" else "TERM:train:9"
    result = launch(
        str(PROGRAM),
        ["-n", "2", "--max-restarts", "1"],
        args=[tmp_path, mode, cut],
        environ={"CUT_RANK": "1"},
        seconds=500,
    )
    assert result.code == 0, result.stderr
    assert "restart 1 of 1: all ranks are started again" in result.stderr
    alone = "loop" if mode == "loop" else "plain"
    assert result_of(result.stdout) == undisturbed(alone, "arrays", "1")


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
time.sleep(300)
"""


def test_a_rank_that_runs_no_further_step_is_ended_and_all_with_it():
    result = launch(STUCK, ["-n", "2"], seconds=200)
    assert result.code in (PREEMPTED, 75)
    assert result.seconds < 150
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
