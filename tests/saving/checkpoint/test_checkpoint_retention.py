"""What is kept is what `tf.train.CheckpointManager` keeps, save by save."""

from __future__ import annotations

import itertools
import os
import pathlib
import time

import pytest
import tensorflow as tf
from processes import check_ranks
from turns import has_turn

import opensmp as smp

SAVES = 20
KEEP = [None, *range(1, 9)]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Hundreds of saves, of which none is to outlast a loss of power."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


class Clock:
    """Seconds since 1970 that pass when they are told to."""

    def __init__(self, monkeypatch):
        self.now = 1_700_000_000.0
        monkeypatch.setattr(time, "time", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def managers(folder, **kwargs):
    """One manager of TensorFlow's and one of ours, each with a variable of its own."""
    background = kwargs.pop("background", False)
    theirs = tf.train.CheckpointManager(
        tf.train.Checkpoint(v=tf.Variable(0.0)), str(folder / "theirs"), **kwargs
    )
    ours = smp.CheckpointManager(
        tf.train.Checkpoint(v=tf.Variable(0.0)), folder / "ours", background=background, **kwargs
    )
    return theirs, ours


def names(paths):
    return [os.path.basename(path) for path in paths]


def files(folder):
    """Names of the files, without those that TensorFlow has not and how values are divided."""
    return sorted(
        {
            name.partition(".data-")[0]
            for name in os.listdir(folder)
            if not name.startswith(".") and not name.endswith(".manifest")
        }
    )


def are_equal(theirs, ours):
    assert names(ours.checkpoints) == names(theirs.checkpoints)
    assert names([ours.latest_checkpoint]) == names([theirs.latest_checkpoint])
    assert files(ours.directory) == files(theirs.directory)
    states = [pathlib.Path(m.directory, "checkpoint").read_text() for m in (ours, theirs)]
    assert states[0] == states[1]
    latest = tf.train.latest_checkpoint(ours.directory)
    assert latest == ours.latest_checkpoint


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("keep", KEEP)
def test_each_save_leaves_what_tensorflow_leaves(smp_init, tmp_path, clock, keep, background):
    smp_init({"partitions": 1})
    theirs, ours = managers(tmp_path, max_to_keep=keep, background=background)
    for _ in range(SAVES):
        clock.now += 1.25
        theirs.save()
        ours.save()
        ours.wait()
        are_equal(theirs, ours)


@pytest.mark.parametrize("keep", [0, -1])
def test_both_refuse_to_keep_none(smp_init, tmp_path, keep):
    for kind, error in ((tf.train, ValueError), (smp, smp.CheckpointError)):
        with pytest.raises(error, match="max_to_keep"):
            kind.CheckpointManager(tf.train.Checkpoint(), str(tmp_path), max_to_keep=keep)


@pytest.mark.parametrize(
    ("hours", "keep", "background"),
    [
        *((hours, keep, False) for hours in (0.5, 1, 2.5) for keep in (1, 3, 5)),
        (0, 3, False),
        (1, None, False),
        (1, 4, True),
    ],
)
def test_every_few_hours_one_is_kept_for_good(smp_init, tmp_path, clock, keep, hours, background):
    smp_init({"partitions": 1})
    arguments = {"max_to_keep": keep, "keep_checkpoint_every_n_hours": hours}
    theirs, ours = managers(tmp_path, **arguments, background=background)
    minutes = itertools.cycle([10, 25, 1, 61, 200, 3])
    for number in range(SAVES):
        if number in (7, 13):  # a program that was started again
            theirs, ours = managers(tmp_path, **arguments, background=background)
            for manager in (theirs, ours):
                manager.restore_or_initialize()
        clock.now += 60 * next(minutes)
        theirs.save()
        ours.save()
        ours.wait()
        are_equal(theirs, ours)
    kept = set(files(ours.directory)) - {"checkpoint"}
    if keep is not None and hours:
        assert len([name for name in kept if name.endswith(".index")]) > keep


@pytest.mark.parametrize("seed", range(4))
def test_numbers_of_the_users_own_and_other_bounds_later(smp_init, tmp_path, clock, seed):
    smp_init({"partitions": 1})
    numbers = [(seed * 7 + i * i * 5) % 11 for i in range(SAVES)]
    theirs, ours = managers(tmp_path, max_to_keep=4)
    for i, number in enumerate(numbers):
        if i == 10:
            hours = 1.5
            theirs, ours = managers(tmp_path, max_to_keep=2, keep_checkpoint_every_n_hours=hours)
        clock.now += 3000
        theirs.save(number)
        ours.save(number)
        are_equal(theirs, ours)


def test_tensorflow_goes_on_where_we_were_and_the_reverse(smp_init, tmp_path, clock):
    smp_init({"partitions": 1})
    arguments = {"max_to_keep": 3, "keep_checkpoint_every_n_hours": 1.0}
    for turn in range(4):
        pair = managers(tmp_path, **arguments)
        folders = [m.directory for m in pair]
        swapped = (
            tf.train.CheckpointManager(pair[1].checkpoint, folders[1], **arguments),
            smp.CheckpointManager(pair[0].checkpoint, folders[0], **arguments),
        )
        theirs, ours = pair if turn % 2 else swapped
        for manager in (theirs, ours):
            manager.restore_or_initialize()
        for _ in range(5):
            clock.now += 2000
            theirs.save()
            ours.save()
            assert names(ours.checkpoints) == names(theirs.checkpoints)
            assert files(ours.directory) == files(theirs.directory)


def test_a_clock_that_is_set_back_loses_no_checkpoint(smp_init, tmp_path, clock):
    smp_init({"partitions": 1})
    value = tf.Variable(0.0)
    manager = smp.CheckpointManager(
        tf.train.Checkpoint(v=value), tmp_path, 2, keep_checkpoint_every_n_hours=1.0
    )
    for step in range(12):
        clock.now += {4: -1e8, 8: 2e8, 9: -2e8}.get(step, 4000.0)
        value.assign(float(step))
        path = manager.save()
        assert manager.checkpoints[-1] == manager.latest_checkpoint == path
        assert len(manager.checkpoints) <= 3
    assert len(manager.checkpoints) == 2
    value.assign(-1.0)
    assert manager.restore() == path
    assert float(value) == 11.0


def test_an_interval_is_that_of_tensorflow(smp_init, tmp_path):
    smp_init({"partitions": 1})
    step = tf.Variable(0, dtype=tf.int64)
    arguments = {"max_to_keep": 3, "step_counter": step, "checkpoint_interval": 4}
    theirs, ours = managers(tmp_path, **arguments)
    for number in range(20):
        step.assign(number)
        check = number % 7 != 3
        for _ in range(2):
            expected, path = theirs.save(check_interval=check), ours.save(check_interval=check)
            assert (path is None) == (expected is None)
            assert names([path] if path else []) == names([expected] if expected else [])
    assert ours.checkpoint_interval == theirs.checkpoint_interval == 4
    theirs, ours = managers(tmp_path, **arguments)  # started again
    for manager in (theirs, ours):
        step.assign(18)
        assert manager.restore_or_initialize() is not None
        written = []
        for now in (18, 21, 22):
            step.assign(now)
            written.append(manager.save() is not None)
        assert written == [False, False, True]
    theirs, ours = managers(tmp_path, **arguments, last_checkpoint_step=20)
    assert (theirs.save(), ours.save()) == (None, None)


def test_a_step_that_cannot_be_read_is_an_error_of_the_save(smp_init, tmp_path):
    smp_init({"partitions": 1})
    manager = smp.CheckpointManager(
        tf.train.Checkpoint(v=tf.Variable(1.0)),
        tmp_path,
        step_counter="seven",
        checkpoint_interval=2,
    )
    with pytest.raises(smp.CheckpointError, match=r"not saved.*seven"):
        manager.save()


def test_an_interval_counts_again_if_the_save_failed(smp_init, tmp_path):
    smp_init({"partitions": 1})
    (tmp_path / "file").write_text("")
    manager = smp.CheckpointManager(
        tf.train.Checkpoint(v=tf.Variable(1.0)),
        tmp_path / "file",
        step_counter=tf.Variable(3),
        checkpoint_interval=2,
    )
    for _ in range(2):
        with pytest.raises(smp.CheckpointError, match="is a file"):
            manager.save()


def test_the_first_values_are_the_users_if_there_is_no_checkpoint(smp_init, tmp_path):
    smp_init({"partitions": 1})
    value = tf.Variable(1.0)
    called = []
    manager = smp.CheckpointManager(
        tf.train.Checkpoint(v=value), tmp_path, init_fn=lambda: called.append(value.assign(7.0))
    )
    assert manager.restore() is None
    assert not called
    assert manager.restore_or_initialize() is None
    assert float(value) == 7.0
    path = manager.save()
    value.assign(1.0)
    assert manager.restore_or_initialize() == path
    assert (float(value), len(called)) == (7.0, 1)


TWO = """
import os, sys
import tensorflow as tf
import opensmp as smp

smp.init()
os.fsync = lambda file: None  # hundreds of saves, of which none is to outlast a loss of power
folder, saves, keeps = sys.argv[1], int(sys.argv[2]), [None, *range(1, 9)]
step = tf.Variable(0)
for background in (False, True):
    for keep in keeps:
        place = f"{folder}/{background}-{keep}"
        v = tf.Variable(0.0)
        ours = smp.CheckpointManager(
            tf.train.Checkpoint(v=v), f"{place}/ours", keep, background=background
        )
        theirs = tf.train.CheckpointManager(
            tf.train.Checkpoint(v=tf.Variable(0.0)), f"{place}/theirs-{smp.rank()}", keep
        )
        for number in range(1, saves + 1):
            v.assign(float(number))
            ours.save()
            theirs.save()
            ours.wait()
            found, expected = (
                [os.path.basename(p) for p in m.checkpoints] for m in (ours, theirs)
            )
            assert found == expected, (background, keep, number, found, expected)
            there, wanted = (
                sorted(n for n in os.listdir(m.directory) if n.endswith(".index"))
                for m in (ours, theirs)
            )
            smp.barrier()
            assert there == wanted, (background, keep, number, there, wanted)
        v.assign(-1.0)
        assert ours.restore() == ours.latest_checkpoint
        assert float(v) == saves
ours = smp.CheckpointManager(
    tf.train.Checkpoint(v=v), f"{folder}/interval", step_counter=step, checkpoint_interval=3
)
found = []
for number in range(8):
    step.assign(number + 100 * smp.rank())  # rank 0 decides for all
    found.append(ours.save() is not None)
assert found == [True, False, False] * 2 + [True, False], found
print("as TensorFlow does")
"""


def test_two_processes_keep_what_tensorflow_keeps(tmp_path):
    saves = SAVES if has_turn(2, of=3) else 10
    for result in check_ranks(TWO, 2, {"partitions": 2}, args=[tmp_path, saves]):
        assert "as TensorFlow does" in result.output
