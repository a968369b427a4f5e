"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import tensorflow as tf
from processes import environ_of_tests
from saving.checkpoint.test_manager import training
from small import MANUAL

import opensmp as smp
from opensmp.saving.checkpoint import writer
from opensmp.saving.checkpoint.background import staging
from opensmp.saving.checkpoint.background.staging import Staging


@pytest.fixture
def gate(monkeypatch):
    """Nothing is written before this event is set."""
    event = threading.Event()
    original = writer.write_part

    def write_part(*args):
        assert event.wait(60)
        return original(*args)

    monkeypatch.setattr(writer, "write_part", write_part)
    yield event
    event.set()


def test_training_goes_on_while_the_values_of_the_save_are_written(
    smp_init, tmp_path, gate, monkeypatch
):
    monkeypatch.setattr(staging, "_WORTH_BYTES", 1)
    smp_init({**MANUAL, "partitions": 2, "microbatches": 2})
    model, optimizer, train = training(1)
    manager = smp.CheckpointManager(
        tf.train.Checkpoint(model=model, optimizer=optimizer), tmp_path, background=True
    )
    train()
    saved = [v.numpy() for v in (*model.variables, *optimizer.variables)]
    path = manager.save()
    expected = [train() for _ in range(3)]
    assert manager.latest_checkpoint is None  # it is not there before it is whole
    gate.set()
    manager.wait()
    manager.wait()  # nothing to wait for
    assert manager.latest_checkpoint == path == tf.train.latest_checkpoint(tmp_path)
    assert manager.restore() == path
    for variable, value in zip((*model.variables, *optimizer.variables), saved, strict=True):
        np.testing.assert_array_equal(variable, value)
    np.testing.assert_allclose([train() for _ in range(3)], expected, rtol=1e-6)


@pytest.mark.parametrize("first", ["the copy", "training"])
def test_it_has_the_bits_of_a_save_in_the_foreground_though_training_goes_on_at_once(
    smp_init, tmp_path, monkeypatch, first
):
    smp_init({"partitions": 1})
    trained = threading.Event()
    if first == "training":
        take = Staging.take
        monkeypatch.setattr(Staging, "take", lambda *args: trained.wait(60) and take(*args))
    big = [tf.Variable(tf.random.normal([1 << 21], seed=seed)) for seed in range(4)]
    big += [tf.Variable(tf.cast(big[0], dtype)) for dtype in (tf.bfloat16, tf.float16, tf.int32)]
    small = tf.Variable([1.5, -2.0])
    checkpoint = tf.train.Checkpoint(big=big, small=small)
    foreground = smp.CheckpointManager(checkpoint, tmp_path / "foreground")
    background = smp.CheckpointManager(checkpoint, tmp_path / "background", background=True)

    @tf.function
    def step():
        for variable in (*big, small):
            variable.assign_add(tf.ones_like(variable))

    def bits():
        return [variable.numpy().tobytes() for variable in (*big, small)]

    memory = []
    for number in range(1, 4):
        trained.clear()
        expected = foreground.save(number)
        path = background.save(number)
        for _ in range(3):
            step()
        trained.set()
        background.wait()
        memory.append(background._staging.memory.ctypes.data)
        assert tf.train.list_variables(path) == tf.train.list_variables(expected)
        later = bits()
        background.restore(path)
        ours = bits()
        foreground.restore(expected)
        for one, other, changed in zip(ours, bits(), later, strict=True):
            assert one == other != changed
    assert len(set(memory)) == 1


def test_files_of_the_checkpoint_that_goes_are_written_over(smp_init, tmp_path):
    smp_init({"partitions": 1})
    value = tf.Variable(tf.zeros([1 << 19]))
    checkpoint = tf.train.Checkpoint(v=value)
    manager = smp.CheckpointManager(checkpoint, tmp_path, max_to_keep=2, background=True)

    def save():
        value.assign_add(tf.ones([1 << 19]))
        path = manager.save()
        manager.wait()
        return path, os.stat(f"{path}.data-00001-of-00002").st_ino

    saved = [save() for _ in range(3)]
    os.link(f"{saved[1][0]}.data-00001-of-00002", tmp_path / "copy")
    saved += [save() for _ in range(2)]
    files = [file for _, file in saved]
    assert files[3] == files[0]  # the first one's, which went with the third
    assert files[4] not in files[:4]  # the second one's is somebody's copy
    for number, (path, _) in list(enumerate(saved, 1))[3:]:
        reader = tf.train.load_checkpoint(path)
        assert set(reader.get_tensor("v/.ATTRIBUTES/VARIABLE_VALUE")) == {float(number)}
    assert manager.checkpoints == [path for path, _ in saved[3:]]
    hidden = [name for name in os.listdir(tmp_path) if name.startswith(".")]
    assert sorted(hidden) == [".ckpt.lock", ".ckpt.spare-0"]
    foreground = smp.CheckpointManager(checkpoint, tmp_path, max_to_keep=2)
    foreground.save()  # needs none
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == [".ckpt.lock"]


def test_a_disk_that_is_full_in_the_midst_of_large_values_is_told(smp_init, tmp_path, monkeypatch):
    smp_init({"partitions": 1})
    value = tf.Variable(tf.zeros([1 << 20]))
    manager = smp.CheckpointManager(tf.train.Checkpoint(v=value), tmp_path, background=True)
    good = manager.save()
    manager.wait()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    value.assign_add(tf.ones([1 << 20]))
    bad = manager.save()
    with pytest.raises(smp.CheckpointError, match=rf"not saved to {bad}.* No space left.* MiB"):
        manager.wait()
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == sorted(
        [".ckpt.lock", "checkpoint", *(f for f in os.listdir(tmp_path) if f.startswith("ckpt-1."))]
    )
    assert manager.restore() == good
    assert float(value[0]) == 0.0


def test_one_is_written_at_a_time_and_restore_waits(smp_init, tmp_path, gate):
    smp_init({"partitions": 1})
    value = tf.Variable(1.0)
    checkpoint = tf.train.Checkpoint(value=value)
    manager = smp.CheckpointManager(checkpoint, tmp_path, background=True)
    first = manager.save()
    value.assign(2.0)
    threading.Timer(0.2, gate.set).start()
    second = manager.save()
    assert manager.checkpoints[0] == first
    value.assign(3.0)
    assert manager.restore() == second
    assert float(value) == 2.0
    manager.save()
    manager.sync()  # TensorFlow's name for it
    assert len(manager.checkpoints) == 3


@pytest.mark.parametrize("call", ["wait", "save", "restore"])
def test_an_error_shows_at_the_next_call_and_once(smp_init, tmp_path, monkeypatch, call):
    smp_init({"partitions": 1})
    manager = smp.CheckpointManager(
        tf.train.Checkpoint(value=tf.Variable(1.0)), tmp_path, background=True
    )
    good = manager.save()
    manager.wait()

    def fails(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_part", fails)
    bad = manager.save()
    with pytest.raises(smp.CheckpointError, match=rf"not saved to {bad}.* No space left.* MiB"):
        getattr(manager, call)()
    monkeypatch.undo()
    assert manager.checkpoints == [good]
    assert manager.restore() == good
    manager.save()
    manager.wait()


SCRIPT = """
import sys, threading, time
import tensorflow as tf
import opensmp as smp
from opensmp.saving.checkpoint import writer as write

smp.init({"partitions": 1})
original = write.write_part
def write_part(*args):
    time.sleep(1.0)  # the program has ended meanwhile
    if len(sys.argv) > 2:
        raise OSError(28, "No space left on device")
    return original(*args)
write.write_part = write_part
big = [tf.ones([6 << 20]) for _ in range(2)]  # enough for threads of its own
manager = smp.CheckpointManager(
    tf.train.Checkpoint(values=[tf.Variable(b) for b in big]), sys.argv[1], background=True
)
manager.save()
if len(sys.argv) == 2:
    manager.save()
"""


@pytest.mark.parametrize("fails", [False, True])
def test_a_program_that_ends_waits_for_the_write_and_tells_its_error(tmp_path, fails):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path, *["fails"] * fails],
        env=environ_of_tests(),
        capture_output=True,
        text=True,
        check=False,
    )
    if fails:
        assert "CheckpointError: The checkpoint was not saved to" in done.stderr
        assert tf.train.latest_checkpoint(tmp_path) is None
        return
    assert (done.returncode, done.stderr.count("Error")) == (0, 0), done.stderr
    latest = tf.train.latest_checkpoint(tmp_path)
    assert latest.endswith("ckpt-2")
    values = tf.train.load_checkpoint(latest).get_tensor("values/1/.ATTRIBUTES/VARIABLE_VALUE")
    assert values.sum() == 6 << 20


def test_checkpoints_can_be_listed_while_they_come_and_go(smp_init, tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "_WORTH_BYTES", 1)
    smp_init({**MANUAL, "partitions": 2, "microbatches": 2})
    model, _, train = training(1)
    train()
    manager = smp.CheckpointManager(
        tf.train.Checkpoint(model=model), tmp_path, max_to_keep=1, background=True
    )
    newest = 0
    for _ in range(30):
        path = manager.save()
        while manager.latest_checkpoint != path:
            listed = manager.checkpoints
            assert len(listed) <= 2
            numbers = [int(name.rsplit("-", 1)[1]) for name in listed]
            assert max([newest, *numbers]) >= newest
            newest = max([newest, *numbers])
    manager.wait()
    assert manager.checkpoints == [path]
