"""Canaries of variables that are about to take memory."""

from __future__ import annotations

import threading

import keras
import tensorflow as tf

from opensmp import _private


def test_before_variables():
    seen = []
    with _private.before_variables(seen.append):
        layer = keras.layers.Dense(3)
        layer.build((1, 2))
    keras.layers.Dense(5).build((1, 2))
    assert seen == [(2, 3), (3,)]


def test_before_variables_of_a_strategy():
    seen = []
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope(), _private.before_variables(seen.append):
        keras.layers.Dense(3).build((1, 2))
    assert (2, 3) in seen


def test_before_variables_of_one_thread():
    seen = []
    with _private.before_variables(seen.append):
        thread = threading.Thread(target=lambda: keras.layers.Dense(3).build((1, 2)))
        thread.start()
        thread.join()
    assert seen == []
