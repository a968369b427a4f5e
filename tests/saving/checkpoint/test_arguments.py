from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import opensmp as smp


def make(directory="/nowhere", *args, **kwargs):
    return smp.CheckpointManager(tf.train.Checkpoint(), directory, *args, **kwargs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_to_keep": 0}, "max_to_keep must be None or 1 or more; received 0"),
        ({"max_to_keep": -1}, "max_to_keep"),
        ({"max_to_keep": 2.5}, "max_to_keep"),
        ({"max_to_keep": True}, "max_to_keep"),
        ({"checkpoint_name": 6}, "give it by its name"),
        ({"checkpoint_name": ""}, "beginning of a file name"),
        ({"checkpoint_name": "a\0"}, "beginning of a file name"),
        ({"checkpoint_name": "a[1]"}, "takes for a pattern"),
        ({"directory": "gs://bucket"}, "on a file system"),
        ({"directory": "a\0"}, "on a file system"),
        ({"directory": b"a"}, "must be a path"),
        ({"keep_checkpoint_every_n_hours": "2"}, "keep_checkpoint_every_n_hours"),
        ({"keep_checkpoint_every_n_hours": -1}, "keep_checkpoint_every_n_hours"),
        ({"checkpoint_interval": 5}, "step_counter must be given"),
        ({"checkpoint_interval": 1.5, "step_counter": 1}, "checkpoint_interval"),
        ({"init_fn": 3}, "init_fn must be a function"),
    ],
)
def test_each_fault_is_told(arguments, message):
    with pytest.raises(smp.CheckpointError, match=message):
        make(**arguments)


def test_all_faults_are_told_at_once():
    with pytest.raises(smp.CheckpointError) as caught:
        smp.CheckpointManager("model", 7, max_to_keep=0, checkpoint_name="a/b", background=1)
    for word in ("checkpoint must", "directory must", "max_to_keep", "checkpoint_name", "backgr"):
        assert word in str(caught.value)


def test_the_arguments_of_tensorflow_are_possible_by_name():
    manager = make(
        max_to_keep=np.int64(3),
        keep_checkpoint_every_n_hours=0.5,
        step_counter=tf.Variable(1),
        checkpoint_interval=10,
        init_fn=print,
        last_checkpoint_step=2,
    )
    assert (manager.max_to_keep, manager.checkpoint_interval) == (3, 10)
    assert make(checkpoint_name="a b-\u00fc.x").latest_checkpoint is None
