from __future__ import annotations

import keras
import pytest
import tensorflow as tf

from opensmp.base.message_text import shown
from opensmp.cli.models.inputs import input_specs, parse_input
from opensmp.errors import PlanError


def specs(symbolic, *texts, microbatch=4):
    return input_specs(symbolic, [parse_input(text) for text in texts], microbatch)


def tensor(*shape, dtype="float32", name):
    return keras.KerasTensor((None, *shape), dtype, name=name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("224x224x3", (None, (224, 224, 3), None)),
        ("224,224,3/float16", (None, (224, 224, 3), tf.float16)),
        ("128/int32", (None, (128,), tf.int32)),
        ("token_ids=128/int32", ("token_ids", (128,), tf.int32)),
        ("/float32", (None, (), tf.float32)),
        ("x-1.y=/string", ("x-1.y", (), tf.string)),
    ],
)
def test_input_is_read(text, expected):
    assert parse_input(text)[:3] == expected


@pytest.mark.parametrize("text", ["", "x", "12x", "3/", "-1x3", "a=b=3", "3 x 4", "224xx3"])
def test_input_that_cannot_be_read_says_what_to_write(text):
    with pytest.raises(PlanError, match=r"expected \[name=\]shape\[/dtype\].*224x224x3"):
        parse_input(text)


def test_unknown_element_type_is_named():
    with pytest.raises(PlanError, match="'int33' is no element type; use float32, int32"):
        parse_input("3/int33")


@pytest.mark.parametrize(
    "text",
    [
        *("\u0663", "9" * 5000, "1x" * 400_000, "0", "8x0", "9" * 18, "x".join(["9" * 9] * 5)),
        *("x".join(["1"] * 255), "8/float32_ref", "8/resource", "8/variant"),
    ],
    ids=shown,
)
def test_input_that_no_tensor_can_be_is_refused(text):
    with pytest.raises(PlanError, match="--input: received") as caught:
        parse_input(text)
    assert len(str(caught.value)) < 500


def test_model_that_knows_its_inputs_needs_nothing():
    assert specs(tensor(8, 8, 3, name="image")) == tf.TensorSpec((4, 8, 8, 3), tf.float32)
    assert specs({"ids": tensor(5, dtype="int32", name="ids")}) == {
        "ids": tf.TensorSpec((4, 5), tf.int32)
    }


def test_what_is_unknown_is_filled_in_by_name_or_in_order():
    symbolic = {
        "mask": tensor(None, dtype="int32", name="mask"),
        "ids": tensor(None, dtype="int32", name="ids"),
    }
    expected = {"mask": tf.TensorSpec((4, 6), tf.int32), "ids": tf.TensorSpec((4, 7), tf.int32)}
    assert specs(symbolic, "ids=7", "mask=6") == expected
    assert specs(symbolic, "mask=6", "7") == expected
    # TensorFlow goes through a dict by its sorted keys.
    assert specs(symbolic, "7", "6") == expected


def test_element_type_may_be_given_alone():
    assert specs(tensor(3, name="x"), "/float16") == tf.TensorSpec((4, 3), tf.float16)


def test_model_that_knows_nothing_takes_what_is_given():
    assert specs(None, "8x3") == tf.TensorSpec((4, 8, 3), tf.float32)
    assert specs(None, "8", "2/int32") == [
        tf.TensorSpec((4, 8), tf.float32),
        tf.TensorSpec((4, 2), tf.int32),
    ]
    assert specs(None, "a=8", "b=2/int32") == {
        "a": tf.TensorSpec((4, 8), tf.float32),
        "b": tf.TensorSpec((4, 2), tf.int32),
    }


@pytest.mark.parametrize(
    ("symbolic", "texts", "parts"),
    [
        (None, (), ["--input shape/dtype", "224x224x3"]),
        (None, ("a=3", "4"), ["all inputs a name of their own, or none", "a=3, 4"]),
        (None, ("a=3", "a=4"), ["all inputs a name of their own"]),
        (tensor(None, 3, name="x"), (), ["'x' has the shape (None, None, 3)", "--input x=128x3"]),
        (tensor(8, name="x"), ("y=8",), ["there is no input 'y', only 'x'"]),
        (tensor(8, name="x"), ("8", "8"), ["2 were given with --input, the model has 1: 'x'"]),
        (tensor(8, name="x"), ("9",), ["--input 9 contradicts the shape of 'x', (None, 8)"]),
        (tensor(8, name="x"), ("8x1",), ["--input 8x1 contradicts"]),
    ],
)
def test_inputs_that_cannot_be_get_a_message_that_says(symbolic, texts, parts):
    with pytest.raises(PlanError) as caught:
        specs(symbolic, *texts)
    for part in parts:
        assert part in str(caught.value)


def test_all_faults_come_at_once():
    symbolic = [tensor(None, name="a"), tensor(None, name="b")]
    with pytest.raises(PlanError, match=r"'a' has the shape .*; 'b' has the shape"):
        specs(symbolic)
