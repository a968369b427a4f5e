from __future__ import annotations

import pytest
import tensorflow as tf

from opensmp import _private
from opensmp.distributed import world
from opensmp.errors import CheckpointError
from opensmp.saving.checkpoint import writer
from opensmp.saving.checkpoint.directory.directory import CheckpointDirectory
from opensmp.saving.collective_errors import RankResult


@pytest.fixture
def here(smp_init):
    return smp_init({"partitions": 1})


def test_a_snapshot_keeps_the_values_of_its_moment(here):
    variable = tf.Variable([1.0, 2.0])
    values = writer.snapshot(tf.train.Checkpoint(v=variable), here, to_host=True)
    variable.assign_add([1.0, 1.0])
    variable.scatter_nd_update([[0]], [9.0])
    (found,) = (value.tensor for value in values if value.name.startswith("v/"))
    assert found.numpy().tolist() == [1.0, 2.0]


def test_a_value_that_cannot_be_read_is_an_error_of_the_save(here, monkeypatch):
    values = [_private.CheckpointValue("v", "", None, lambda: 1 / 0)]
    monkeypatch.setattr(_private, "checkpoint_values", lambda checkpoint: (values, b""))
    with pytest.raises(CheckpointError, match=r"was not saved, earlier .*ZeroDivisionError"):
        writer.snapshot(tf.train.Checkpoint(), here)


def test_parts_and_whole(here, tmp_path):
    shelf = CheckpointDirectory(str(tmp_path), "ckpt")
    shelf.prepare()
    values = writer.snapshot(tf.train.Checkpoint(v=tf.Variable(5.0)), here)
    part = writer.own_part(values, shelf, here)
    assert part.error is None
    assert writer.whole([part], shelf, 4, None) == [part]
    reader = tf.train.load_checkpoint(shelf.prefix(4))
    assert reader.get_tensor("v/.ATTRIBUTES/VARIABLE_VALUE") == 5.0


def test_a_part_that_failed_leaves_no_whole(here, tmp_path):
    shelf = CheckpointDirectory(str(tmp_path), "ckpt")
    shelf.prepare()
    bad = RankResult(error="no room")
    assert writer.whole([RankResult(["x"]), bad], shelf, 1, None)[1] == bad
    assert [file.name for file in tmp_path.iterdir()] == [".ckpt.lock"]
    with pytest.raises(CheckpointError, match=r"not saved to /p, earlier ones .* rank 1: no room"):
        writer.raise_errors([RankResult(), bad], "/p")


def test_places_are_counted_by_replica_and_member():
    four = world.World(config=None, devices=(), rank=3, size=4, mp_group=(1, 3), dp_group=(2, 3))
    assert writer.place_of(four) == (1, 1)
