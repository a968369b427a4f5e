"""What goes wrong with checkpoints is told, and nothing is lost by it."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import subprocess

import keras
import numpy as np
import pytest
import tensorflow as tf
from saving.checkpoint.test_manager import training
from small import MANUAL, Net

import opensmp as smp
from opensmp.saving.checkpoint.directory import directory as shelf


class Run:
    """A variable whose values are all equal, and a manager of it."""

    def __init__(self, directory, **kwargs):
        self.values = tf.Variable(tf.ones([2000]))
        self.manager = smp.CheckpointManager(
            tf.train.Checkpoint(values=self.values), directory, **kwargs
        )

    def save(self, number):
        self.values.assign(tf.fill([2000], float(number)))
        return self.manager.save()

    def restored(self, *args):
        self.values.assign(tf.fill([2000], -1.0))
        self.manager.restore(*args)
        return float(self.values[0]), float(self.values[-1])


@pytest.fixture
def run(smp_init, tmp_path):
    smp_init({"partitions": 1})
    made = Run(tmp_path / "run")
    made.save(1)
    return made


def only_the_first_is_there(run):
    assert [path.rsplit("-", 1)[1] for path in run.manager.checkpoints] == ["1"]
    assert run.restored() == (1.0, 1.0)
    assert not os.path.exists(os.path.join(run.manager.directory, ".ckpt.unfinished"))
    assert run.save(2).endswith("-2")  # the number was not used up
    assert run.restored() == (2.0, 2.0)


# ------------------------------------------------------------------------------------ writing


def test_a_file_that_cannot_grow_is_an_error_and_loses_nothing(run):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(smp.CheckpointError, match=r"(?s)not saved to .*-2, .*MiB are free at"):
            run.save(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    only_the_first_is_there(run)


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for little; it takes the right to mount one."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(path)]
    try:
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("no right to mount a file system")
    except FileNotFoundError:
        pytest.skip("no mount command")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_full_disk_is_an_error_that_tells_the_room_and_loses_nothing(smp_init, small_disk):
    smp_init({"partitions": 1})
    run = Run(small_disk, max_to_keep=1)
    run.save(1)
    ballast = small_disk / "ballast"
    with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    with pytest.raises(smp.CheckpointError, match=r"No space left on device.*0 MiB are free at"):
        run.save(2)
    ballast.unlink()
    only_the_first_is_there(run)


@pytest.mark.parametrize("call", ["replace", "to_disk", "write_manifest", "_record"])
@pytest.mark.parametrize("number", [None, 1])
def test_no_space_at_any_moment_of_the_commit_loses_nothing(run, monkeypatch, call, number):
    def fails(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner = {"replace": os, "_record": shelf.CheckpointDirectory}.get(call, shelf)
    monkeypatch.setattr(owner, call, fails)
    run.values.assign(tf.fill([2000], 2.0))
    with pytest.raises(smp.CheckpointError, match="No space left on device"):
        run.manager.save(checkpoint_number=number)
    monkeypatch.undo()
    only_the_first_is_there(run)


def test_a_directory_that_is_a_file_is_told(smp_init, tmp_path):
    smp_init({"partitions": 1})
    (tmp_path / "file").write_text("mine")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(smp.CheckpointError, match=r"file is a file; expected a directory"):
            Run(directory).save(1)
    assert (tmp_path / "file").read_text() == "mine"


def test_no_permission_is_told_with_the_directory(smp_init, tmp_path, monkeypatch):
    smp_init({"partitions": 1})

    def fails(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "makedirs", fails)
    with pytest.raises(
        smp.CheckpointError, match=rf"may not write to {tmp_path}; choose another place"
    ):
        Run(tmp_path / "run").save(1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_the_right_to_write_is_told(run):
    os.chmod(run.manager.directory, 0o500)
    try:
        with pytest.raises(smp.CheckpointError, match="may not write to"):
            run.save(2)
    finally:
        os.chmod(run.manager.directory, 0o700)
    only_the_first_is_there(run)


# ------------------------------------------------------------------------------------ reading


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("ending", ["data-00000-of-00001", "index"])
@pytest.mark.parametrize("damage", ["one bit", "half", "object graph"])
def test_a_damaged_file_is_left_out_with_a_warning(run, tmp_path, ending, damage):
    path = run.save(2)
    file = tmp_path / "run" / f"ckpt-2.{ending}"
    if damage == "half":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif damage == "object graph" and ending != "index":
        flip(file, file.read_bytes().find(b"save_counter"))
    else:
        flip(file, file.stat().st_size // 2)
    with pytest.warns(UserWarning, match=r"ckpt-2 is damaged and is left out"):
        assert run.restored() == (1.0, 1.0)
    with pytest.raises(smp.CheckpointError, match=r"The newest good one here is .*ckpt-1"):
        run.restored(path)
    assert float(run.values[0]) == -1.0  # nothing was restored


@pytest.mark.parametrize("damage", ["removed", "a directory"])
def test_one_that_has_lost_its_index_is_told_though_no_state_file_names_it(run, tmp_path, damage):
    run.save(2)
    (tmp_path / "run" / "checkpoint").unlink()
    index = tmp_path / "run" / "ckpt-2.index"
    index.unlink()
    if damage == "a directory":
        index.mkdir()
    with pytest.warns(UserWarning, match="ckpt-2 is damaged and is left out"):
        assert run.restored() == (1.0, 1.0)


def test_damaged_values_are_told_though_their_variables_are_made_later(smp_init, tmp_path):
    smp_init({**MANUAL, "partitions": 2, "microbatches": 2})
    model, optimizer, train = training(1)
    train()
    smp.CheckpointManager(tf.train.Checkpoint(model=model, optimizer=optimizer), tmp_path).save()
    flip(tmp_path / "ckpt-1.data-00000-of-00001", 20)
    fresh = tf.train.Checkpoint(model=Net(), optimizer=keras.optimizers.Adam())
    with pytest.raises(smp.CheckpointError, match=r"DataLossError.*\n.*no other good one"):
        smp.CheckpointManager(fresh, tmp_path).restore()


def test_paths_without_a_checkpoint_are_told(run, tmp_path):
    (tmp_path / "empty").mkdir()
    for path, message in [
        (tmp_path / "nothing" / "ckpt-1", r"there is no file ckpt-1\.index"),
        (tmp_path / "empty", r"Expected: a directory with checkpoints"),
    ]:
        with pytest.raises(smp.CheckpointError, match=message) as caught:
            run.restored(path)
        assert "The newest good one here is" in str(caught.value)


def test_checkpoints_of_other_programs_are_told_apart(run, tmp_path):
    path = tf.train.Checkpoint(other=tf.Variable(1.0)).save(str(tmp_path / "other"))
    with pytest.raises(smp.CheckpointError, match=r"(?s)not in the checkpoint.*shape \(2000,\)"):
        run.restored(path)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.compat.v1.get_variable("v", [1])
        session.run(tf.compat.v1.global_variables_initializer())
        path = tf.compat.v1.train.Saver().save(session, str(tmp_path / "old"))
    with pytest.raises(smp.CheckpointError, match=r"has no object graph.* tensors: v"):
        run.restored(path)


class Longer(Net):
    """`Net` with one layer more."""

    def __init__(self):
        super().__init__()
        self.extra = keras.layers.Dense(3, name="extra")

    def call(self, x, training=None):
        with smp.partition(1):
            return self.extra(super().call(x, training))


DIFFERENT = r"\(4, 3\) float32 in the checkpoint, \(4, 7\) float32 in .*top/kernel"
MISSING = (
    r"[26] are not in the checkpoint:\s+model/extra/_kernel: .*extra/kernel with shape \(3, 3\)"
)
UNUSED = (
    r"[26] are in the checkpoint, but not in the program:\s+model/extra/_kernel.*shape \(3, 3\)"
)


@pytest.mark.parametrize("when", ["before the first step", "later"])
@pytest.mark.parametrize(
    ("saved", "restored", "message"),
    [
        (Net, lambda: Net(units=7), DIFFERENT),
        (Net, Longer, MISSING),
        (Longer, Net, UNUSED),
    ],
    ids=["other shapes", "missing", "unused"],
)
def test_another_architecture_is_told_with_variables_and_shapes(
    smp_init, tmp_path, when, saved, restored, message
):
    smp_init({**MANUAL, "partitions": 2, "microbatches": 2})
    model, optimizer, train = training(1, saved())
    train()
    path = smp.CheckpointManager(
        tf.train.Checkpoint(model=model, optimizer=optimizer), tmp_path
    ).save()
    good, good_optimizer, train_good = training(1, saved())
    model, optimizer, train = training(1, restored())
    manager = smp.CheckpointManager(tf.train.Checkpoint(model=model, optimizer=optimizer), tmp_path)
    if when == "later":
        train()
        before = model.get_weights()
        with pytest.raises(smp.CheckpointError, match=message):
            manager.restore(path)
        assert all(map(np.array_equal, before, model.get_weights()))
        return
    manager.restore(path)
    for _ in range(2):  # it does not go on with other values at the second call
        with pytest.raises(smp.CheckpointError, match=message):
            train()
    manager = smp.CheckpointManager(
        tf.train.Checkpoint(model=good, optimizer=good_optimizer), tmp_path
    )
    manager.restore(path)
    train_good()  # the other model is no obstacle


def test_another_optimizer_is_told_when_its_variables_are_made(smp_init, tmp_path):
    smp_init({**MANUAL, "partitions": 2, "microbatches": 2})
    model, optimizer, train = training(1)
    train()
    checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer)
    path = smp.CheckpointManager(checkpoint, tmp_path).save()
    other = keras.optimizers.SGD(0.1, momentum=0.9)
    smp.CheckpointManager(tf.train.Checkpoint(model=model, optimizer=other), tmp_path).restore(path)
    with pytest.raises(smp.CheckpointError, match=r"in the checkpoint, .* in .*momentum"):
        other.build(model.trainable_variables)


def test_an_iterator_of_another_dataset_is_told_and_nothing_is_restored(smp_init, tmp_path):
    smp_init({"partitions": 1})
    value, data = tf.Variable(1.0), tf.data.Dataset.range(9)
    checkpoint = tf.train.Checkpoint(value=value, data=iter(data), other=iter(data))
    smp.CheckpointManager(checkpoint, tmp_path).save()
    value.assign(2.0)
    first = iter(data)
    assert int(next(first)) == 0
    checkpoint = tf.train.Checkpoint(value=value, data=first, other=iter(data.shard(2, 0).batch(2)))
    with pytest.raises(smp.CheckpointError, match=r"iterator at other cannot go on where it was"):
        smp.CheckpointManager(checkpoint, tmp_path).restore()
    assert (float(value), int(next(first))) == (2.0, 1)


def test_options_of_tensorflow_are_refused(run):
    with pytest.raises(smp.CheckpointError, match="background=True"):
        run.manager.save(options=tf.train.CheckpointOptions(enable_async=True))


def test_a_checkpoint_found_damaged_goes_before_a_good_one(smp_init, tmp_path):
    smp_init({"partitions": 1})
    run = Run(tmp_path, max_to_keep=2)
    for number in range(1, 4):
        run.save(number)
    (tmp_path / "ckpt-3.data-00000-of-00001").write_bytes(b"half")
    run = Run(tmp_path, max_to_keep=2)
    with pytest.warns(UserWarning, match="ckpt-3 is damaged"):
        assert run.restored() == (2.0, 2.0)
    run.save(4)
    assert [os.path.basename(path) for path in run.manager.checkpoints] == ["ckpt-2", "ckpt-4"]
    (tmp_path / "ckpt-4.data-00000-of-00001").write_bytes(b"half")
    with pytest.warns(UserWarning, match="ckpt-4 is damaged"):
        assert run.restored() == (2.0, 2.0)
    run.save(5)
    assert [os.path.basename(path) for path in run.manager.checkpoints] == ["ckpt-2", "ckpt-5"]
