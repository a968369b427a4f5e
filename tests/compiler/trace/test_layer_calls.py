from __future__ import annotations

import keras
import pytest
import tensorflow as tf
from keras import layers

from opensmp.compiler.trace.layer_calls import layer_calls, numbered_stems, operation_labels, stem
from opensmp.compiler.trace.trace import trace


class Block(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(4, name="dense")
        self.dropout = layers.Dropout(0.5, name="dropout")

    def call(self, x, training=None):
        return self.dropout(self.dense(x), training=training) + x


class Net(keras.Model):
    def __init__(self):
        super().__init__(name="net")
        self.first, self.second = Block(name="first"), Block(name="second")

    def call(self, x, training=None):
        x = self.second(self.first(x, training=training), training=training)
        return tf.exp(self.first(x, training=training))


@pytest.fixture(scope="module")
def net():
    model = Net()
    model(tf.zeros([2, 4]))
    return model


LABELS = (
    "*",
    "first",
    "first/dense",
    "first/dropout",
    "second",
    "second/dense",
    "second/dropout",
    "first#2",
    "first#2/dense",
    "first#2/dropout",
)


@pytest.mark.parametrize("training", [True, False])
def test_labels_are_the_names_around_a_call(net, training):
    traced = trace(net, (tf.zeros([2, 4]),), {"training": training}, name="net")
    labels, label_of = operation_labels(traced)
    assert labels == LABELS
    assert len(label_of) == len(traced.operations) - len(traced.sources)
    kinds = {(traced.graph.get_operation_by_name(name).type, at) for name, at in label_of.items()}
    assert ("Exp", "*") in kinds
    assert ("MatMul", "first#2/dense") in kinds
    assert ("AddV2", "second") in kinds
    assert any(label == "first/dropout" for _, label in kinds) == training


def test_calls_hold_every_operation_once_and_empty_calls_stay(net):
    traced = trace(net, (tf.zeros([2, 4]),), {"training": False}, name="net")
    calls = layer_calls(traced)
    assert tuple(call.label for call in calls) == LABELS
    names = [name for call in calls for name in call.operations]
    assert sorted(names) == sorted(op.name for op in traced.operations if op not in traced.sources)
    assert calls[3].label == "first/dropout"
    assert calls[3].pieces == ()


def test_groups_divide_a_call_into_pieces(net):
    traced = trace(net, (tf.zeros([2, 4]),), {"training": False}, name="net")
    dense = layer_calls(traced)[2].operations
    calls = layer_calls(traced, [("first/dense", dense[:1]), ("first/dense", dense[1:2])])
    pieces = {piece.name: piece.operations for piece in calls[2].pieces}
    assert pieces["first/dense"] == dense[:1]
    assert pieces["first/dense#2"] == dense[1:2]


def test_model_called_by_another_function_is_a_layer_like_others():
    dense = layers.Dense(3, name="dense")
    dense.build((None, 2))
    traced = trace(lambda x: tf.exp(dense(x)), (tf.zeros([1, 2]),), {}, name="function")
    assert operation_labels(traced)[0] == ("*", "dense")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dense", "dense"),
        ("dense_12", "dense"),
        ("sequential_1/dense_2_1/MatMul_3", "sequential/dense/MatMul"),
        ("encoder/dense_4#2/x", "encoder/dense/x"),
        ("conv2_block1_1_conv", "conv2_block1_1_conv"),
        ("", ""),
    ],
)
def test_stem_has_no_running_numbers(name, expected):
    assert stem(name) == expected


def test_equal_stems_are_counted():
    assert numbered_stems(["a", "a_1", "b", "a_7"]) == [("a", 0), ("a", 1), ("b", 0), ("a", 2)]


def test_stem_of_a_long_name_takes_no_longer_than_its_length():
    name = "dense" + "_1" * 500_000 + "x"  # minutes, if each number is a place to begin
    assert stem(name) == name
    assert stem(name + "_2") == name
    assert stem("a" + "_1" * 500_000) == "a"
