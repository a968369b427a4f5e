from __future__ import annotations

import os

import pytest
import tensorflow as tf

from opensmp.saving.checkpoint.directory.directory import CheckpointDirectory
from opensmp.saving.checkpoint.directory.manifest import fault


@pytest.fixture
def shelf(tmp_path):
    return CheckpointDirectory(str(tmp_path), "ckpt")


def make(shelf, number, value, max_to_keep=None):
    shelf.prepare()
    made = os.path.join(shelf.staging, f"ckpt-{number}")
    tf.train.Checkpoint(value=tf.Variable(value)).write(made)
    shelf.commit(number, max_to_keep)
    shelf.discard()


def value_of(path):
    return float(tf.train.load_checkpoint(path).get_tensor("value/.ATTRIBUTES/VARIABLE_VALUE"))


def names(shelf):
    return [os.path.basename(path) for path, _ in shelf.checkpoints()]


def test_checkpoints_are_listed_oldest_first_and_the_oldest_go(shelf):
    for number in (1, 2, 10):
        make(shelf, number, float(number), max_to_keep=2)
    assert names(shelf) == ["ckpt-2", "ckpt-10"]
    assert shelf.numbers() == {2, 10}
    assert tf.train.latest_checkpoint(shelf.directory) == shelf.prefix(10)
    assert not os.path.exists(shelf.staging)


def test_a_checkpoint_of_the_same_number_is_replaced(shelf):
    make(shelf, 1, 1.0)
    make(shelf, 1, 2.0)
    assert names(shelf) == ["ckpt-1"]
    assert value_of(shelf.prefix(1)) == 2.0


def test_a_complete_checkpoint_that_the_state_file_lacks_is_listed(shelf):
    make(shelf, 1, 1.0)
    state = os.path.join(shelf.directory, "checkpoint")
    with open(state) as file:
        before = file.read()
    make(shelf, 2, 2.0)
    with open(state, "w") as file:
        file.write(before)
    assert names(shelf) == ["ckpt-1", "ckpt-2"]


def test_a_directory_may_be_moved(shelf, tmp_path):
    make(shelf, 1, 1.0)
    os.rename(shelf.directory, f"{tmp_path}-moved")
    moved = CheckpointDirectory(f"{tmp_path}-moved", "ckpt")
    assert moved.checkpoints()[0][0] == f"{tmp_path}-moved/ckpt-1"


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_replacement_that_was_cut_off_is_finished(shelf, monkeypatch, moved):
    make(shelf, 1, 1.0)
    replace, calls = os.replace, []

    def killed(*args):
        calls.append(args)
        if len(calls) > 3 + moved:  # three files go out first
            raise KeyboardInterrupt
        replace(*args)

    monkeypatch.setattr(os, "replace", killed)
    monkeypatch.setattr(
        CheckpointDirectory, "remove", lambda *args: None
    )  # a killed process mends nothing
    shelf.prepare()
    tf.train.Checkpoint(value=tf.Variable(2.0)).write(os.path.join(shelf.staging, "ckpt-1"))
    with pytest.raises(KeyboardInterrupt):
        shelf.commit(1, None)
    monkeypatch.undo()
    assert names(shelf) == []
    shelf.recover()
    assert fault(shelf.prefix(1)) is None
    assert value_of(shelf.prefix(1)) == 2.0


def test_files_of_a_killed_process_go_and_those_of_others_stay(shelf, tmp_path):
    make(shelf, 1, 1.0)
    for ending in ("data-00000-of-00001", "manifest"):
        (tmp_path / f"ckpt-2.{ending}").write_text("it was being removed")
    (tmp_path / "ckpt-3.data-00000-of-00001").write_text("of another program")
    (tmp_path / "other-2.data-00000-of-00001").write_text("mine")
    os.mkdir(shelf.staging)
    (tmp_path / ".ckpt.unfinished" / "part-0").write_text("half")
    shelf.prepare()
    assert os.listdir(shelf.staging) == []
    assert not list(tmp_path.glob("ckpt-2.*"))
    assert (tmp_path / "ckpt-3.data-00000-of-00001").exists()
    assert (tmp_path / "other-2.data-00000-of-00001").exists()
    assert names(shelf) == ["ckpt-1"]
