"""A model that is dropped takes its graphs, plans, programs and threads with it."""

from __future__ import annotations

import gc
import textwrap
import threading
import time
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from processes import check_ranks

import opensmp as smp
from opensmp.compiler.lowering.program import Program
from opensmp.compiler.plan.plan import Plan

KINDS = (tf.__internal__.FuncGraph, Plan, Program, smp.DistributedModel)


def fit(x, y):
    layers = [keras.Input((8,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(3)]
    model = smp.DistributedModel.from_keras(keras.Sequential(layers))
    model.compile("adam", "mse", metrics=["mae"])
    model.fit(x, y, batch_size=8, verbose=0)
    model.evaluate(x, y, verbose=0)
    model.predict(x, verbose=0)


def step(x, y):
    layers = [keras.Input((8,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(3)]
    model = smp.DistributedModel.from_keras(keras.Sequential(layers))
    optimizer = keras.optimizers.Adam()

    @smp.step
    def forward_backward(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
        return tape.gradient(loss, model.trainable_variables), loss

    @tf.function
    def train_step(x, y):
        gradients, loss = forward_backward(x, y)
        gradients = [gradient.accumulate() for gradient in gradients]
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss.reduce_mean()

    for _ in range(2):
        train_step(tf.constant(x), tf.constant(y))


TRAIN = {"fit": fit, "step": step}


def left_behind(train) -> list[str]:
    """What one more model leaves in memory, after the first ones of the process."""
    x = np.arange(128, dtype="float32").reshape(16, 8)
    y = x[:, :3]
    for _ in range(2):  # what is made once for a process
        train(x, y)
    gc.collect()
    before = weakref.WeakSet(each for each in gc.get_objects() if isinstance(each, KINDS))
    train(x, y)
    gc.collect()
    limit = time.monotonic() + 120
    while any(t.name == "opensmp-inbox" for t in threading.enumerate()):
        assert time.monotonic() < limit, threading.enumerate()
        time.sleep(0.05)  # until the threads know that their graph is gone
    gc.collect()
    after = [each for each in gc.get_objects() if isinstance(each, KINDS)]
    return [f"{type(each).__name__} {each.name}" for each in after if each not in before]


@pytest.mark.parametrize("way", TRAIN)
def test_a_dropped_model_leaves_nothing_behind(way, smp_init):
    smp_init({"partitions": 2, "microbatches": 2})
    assert left_behind(TRAIN[way]) == []


def test_a_dropped_model_leaves_nothing_behind_in_two_ranks():
    script = """
        import opensmp as smp
        from training.test_dropped_models import TRAIN, left_behind

        smp.init({"partitions": 2, "microbatches": 2})
        for way, train in TRAIN.items():
            left = left_behind(train)
            assert left == [], (way, left)
        smp.barrier()
    """
    check_ranks(textwrap.dedent(script), 2, fresh=True)
