"""The examples of the API page, but for its two checkpoint loops: saving/test_seed_loops.py."""

from __future__ import annotations

import inspect

import keras
import numpy as np
import tensorflow as tf

import smdistributed.modelparallel.tensorflow as smp


def test_the_default_paths_are_those_of_the_page():
    assert inspect.signature(smp.DistributedModel.save_model).parameters["save_path"].default == (
        "/opt/ml/model"
    )
    parameters = inspect.signature(smp.CheckpointManager).parameters
    assert {name: parameters[name].default for name in list(parameters)[1:4]} == {
        "directory": "/opt/ml/checkpoints",
        "max_to_keep": None,
        "checkpoint_name": "ckpt",
    }


def test_operations_are_placed_by_the_innermost_context(smp_init):
    smp_init({"partitions": 4, "auto_partition": False, "default_partition": 0})

    class Net(smp.DistributedModel):
        def call(self, x):
            x = x + tf.constant(1.2)  # placed in partition 0
            with smp.partition(1):
                y = tf.add(x, tf.constant(2.3))  # placed in partition 1
                with smp.partition(3):
                    z = tf.reduce_sum(y)  # placed in partition 3
            return z

    model = Net()
    np.testing.assert_allclose(model(tf.zeros([2])), 7.0)
    sizes = model.plan.sizes
    assert [size > 0 for size in sizes] == [True, True, False, True]


def test_the_model_is_called_in_a_step_and_its_output_is_there_in_all_ranks(smp_init):
    smp_init({"partitions": 2, "microbatches": 2})
    model = smp.DistributedModel.from_keras(
        keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dense(1)])
    )

    @smp.step
    def step(inputs):
        predictions = model(inputs)  # model is a smp.DistributedModel object
        return predictions

    assert step(tf.ones([4, 3])).concat().shape == (4, 1)
