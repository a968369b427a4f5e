from __future__ import annotations

from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from opensmp.compiler.trace.structure import Structure


class Pair(NamedTuple):
    left: Any
    right: Any


def test_a_nest_is_taken_apart_into_tensors_and_the_rest():
    x, y = tf.ones([2]), tf.zeros([3])
    structure = Structure.of({"a": [x, True], "b": Pair(y, None), "c": "text"})
    assert structure.tensors[0] is x
    assert structure.tensors[1] is y


def test_other_tensors_are_packed_in_their_places():
    structure = Structure.of({"a": [tf.ones([2]), 7], "b": Pair(tf.zeros([3]), None)})
    packed = structure.pack(["first", "second"])
    assert packed == {"a": ["first", 7], "b": Pair("second", None)}
    assert isinstance(packed["b"], Pair)


def test_composite_tensors_count_as_their_components():
    ragged = tf.ragged.constant([[1.0], [2.0, 3.0]])
    slices = tf.IndexedSlices(tf.ones([1, 2]), tf.constant([0]), tf.constant([4, 2]))
    structure = Structure.of((ragged, slices))
    assert len(structure.tensors) == 2 + 3
    again, sparse = structure.pack(structure.tensors)
    assert again.to_list() == [[1.0], [2.0, 3.0]]
    assert isinstance(sparse, tf.IndexedSlices)


def test_arrays_and_variables_become_tensors():
    structure = Structure.of(
        [np.ones(2), np.float32(3.0), tf.Variable(4.0), keras.Variable(5.0), 6.0]
    )
    assert all(isinstance(t, tf.Tensor) for t in structure.tensors)
    assert [t.numpy().tolist() for t in structure.tensors] == [[1.0, 1.0], 3.0, 4.0, 5.0]
    assert structure.template[-1] == 6.0


def signature(*nest: Any) -> str:
    return Structure.of(nest).signature()


def test_calls_that_one_trace_can_serve_have_equal_signatures():
    assert signature(tf.ones([2, 3]), True) == signature(tf.zeros([2, 3]), True)
    assert signature({"x": tf.ones([2])}) == signature({"x": np.zeros(2, "float32")})


def test_calls_that_need_a_trace_of_their_own_have_different_signatures():
    x, layer = tf.ones([2, 3]), keras.layers.Dense(1)
    nests = [
        (x,),
        (tf.ones([3, 2]),),
        (tf.ones([2, 3], tf.float64),),
        ([x],),
        ((x,),),
        ({"x": x},),
        ({"y": x},),
        (x, None),
        (x, True),
        (x, 1),
        (x, 1.0),
        (x, "1"),
        (x, layer),
        (x, keras.layers.Dense(1)),
        (tf.RaggedTensor.from_tensor(x),),
        (tf.sparse.from_dense(x),),
    ]
    assert len({signature(*nest) for nest in nests}) == len(nests)


def test_an_unknown_batch_is_part_of_the_signature():
    found = []

    @tf.function(input_signature=[tf.TensorSpec([None, 3])])
    def run(x):
        found.append(signature(x))
        return x

    run(tf.ones([2, 3]))
    assert found[0] != signature(tf.ones([2, 3]))
