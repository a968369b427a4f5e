"""Canaries of slices of a class of their own."""

from __future__ import annotations

import tensorflow as tf

from opensmp import _private


class Mine(_private.NotedSlices):
    pass


def mine(note: str = "here") -> Mine:
    return Mine(tf.ones([1, 3]), tf.constant([2]), tf.constant([4, 3]), note=note)


def test_noted_slices_come_out_of_functions_and_nests_as_what_they_are():
    traces = []

    @tf.function
    def double(slices):
        traces.append(slices.note)
        values = slices.values * 2.0
        return [Mine(values, slices.indices, slices.dense_shape, slices.note)]

    (result,) = double(mine())
    assert type(result) is Mine
    assert result.note == "here"
    assert tf.convert_to_tensor(result).numpy().tolist()[2] == [2.0] * 3
    assert type(tf.nest.map_structure(tf.identity, [mine()], expand_composites=True)[0]) is Mine
    double(mine())
    assert traces == ["here"]
    assert double(mine("there"))[0].note == "there"
    assert traces == ["here", "there"]
