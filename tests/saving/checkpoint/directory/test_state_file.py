from __future__ import annotations

import os

import pytest
import tensorflow as tf

from opensmp.saving.checkpoint.directory import state_file as module
from opensmp.saving.checkpoint.directory.state_file import (
    State,
    StateFileError,
    read_state,
    write_state,
)

GOOD = State(("ckpt-1", "ckpt-2"), (10.0, 1732.123456789012), 0.5)


@pytest.fixture
def scratch(tmp_path):
    (tmp_path / "scratch").mkdir()
    return str(tmp_path / "scratch")


def test_what_is_written_is_read(tmp_path, scratch):
    assert read_state(str(tmp_path)) is None
    for state in (GOOD, State(('\u00fc "\\\n-3',), (), 0.0)):
        write_state(str(tmp_path), state, scratch)
        assert read_state(str(tmp_path)) == state
    assert os.listdir(scratch) == []


def test_it_is_what_tensorflow_writes(tmp_path, scratch):
    manager = tf.train.CheckpointManager(
        tf.train.Checkpoint(v=tf.Variable(1.0)), tmp_path, max_to_keep=2
    )
    for _ in range(3):
        manager.save()
    theirs = (tmp_path / "checkpoint").read_text()
    state = read_state(str(tmp_path))
    assert state.names == ("ckpt-2", "ckpt-3")
    write_state(str(tmp_path), state, scratch)
    assert (tmp_path / "checkpoint").read_text() == theirs


def test_directories_before_a_name_mean_nothing(tmp_path):
    tf.compat.v1.train.update_checkpoint_state(
        str(tmp_path), "/gone/ckpt-2", ["../other/ckpt-1", "/gone/ckpt-2"]
    )
    assert read_state(str(tmp_path)) == State(("ckpt-1", "ckpt-2"), (), 0.0)


def good(**changes):
    lines = {
        "model": 'model_checkpoint_path: "ckpt-2"',
        "first": 'all_model_checkpoint_paths: "ckpt-1"',
        "second": 'all_model_checkpoint_paths: "ckpt-2"',
        "times": "all_model_checkpoint_timestamps: 1.0 all_model_checkpoint_timestamps: 2.0",
        "last": "last_preserved_timestamp: 0.5",
    }
    return "\n".join({**lines, **changes}.values()).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"\0\xff\xfe", "no list of checkpoints"),
        (b"\xef\xbf\xbd" * 100, "no list of checkpoints"),
        (b"a { " * 100_000, "no list of checkpoints"),
        (b'model_checkpoint_path: "ckpt-2"', "not the last one"),
        (good(model=""), "not the last one"),
        (good(second=""), "not the last one"),
        (good(times="all_model_checkpoint_timestamps: 1.0"), "2 checkpoints and 1 times"),
        (good(times="all_model_checkpoint_timestamps: 1.0 " * 3), "2 checkpoints and 3 times"),
        (good(times="all_model_checkpoint_timestamps: nan " * 2), "not finite"),
        (good(last="last_preserved_timestamp: inf"), "not finite"),
        (good(last='last_preserved_timestamp: "x"'), "no list of checkpoints"),
    ],
)
def test_each_damage_is_told(tmp_path, content, message):
    (tmp_path / "checkpoint").write_bytes(content)
    with pytest.raises(StateFileError, match=message):
        read_state(str(tmp_path))


def test_what_is_no_file_or_too_long_is_told(tmp_path, monkeypatch):
    (tmp_path / "checkpoint").write_bytes(good())
    monkeypatch.setattr(module, "_LARGEST_BYTES", 100)
    with pytest.raises(StateFileError, match="more than 100 bytes"):
        read_state(str(tmp_path))
    (tmp_path / "checkpoint").unlink()
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(StateFileError, match=r"cannot be read: Is a directory"):
        read_state(str(tmp_path))


def test_a_file_that_may_not_be_read_is_told(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module, "open", refuse, raising=False)
    with pytest.raises(StateFileError, match="cannot be read: Permission denied"):
        read_state(str(tmp_path))
