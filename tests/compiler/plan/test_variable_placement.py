from __future__ import annotations

import keras
import tensorflow as tf
from small import in_partition, planned

from opensmp.compiler.plan.variable_placement import variable_homes

X = tf.ones([2, 3])


def test_a_variable_lives_where_it_is_used_first():
    first, second = keras.layers.Dense(3), keras.layers.Dense(3)

    def call(x):
        x = in_partition(1, first, x)
        x = in_partition(0, second, x)
        return in_partition(0, first, x)

    homes = variable_homes(*planned(call, X), {})
    assert [homes[id(v)] for v in (first.kernel, first.bias)] == [1, 1]
    assert [homes[id(v)] for v in (second.kernel, second.bias)] == [0, 0]


def test_homes_of_earlier_plans_stay():
    dense = keras.layers.Dense(3, use_bias=False)
    graph, plan = planned(lambda x: in_partition(1, dense, x), X)
    other = object()
    known = {id(dense.kernel): 0, id(other): 1}
    assert variable_homes(graph, plan, known) == known


def test_a_variable_that_is_read_but_used_by_nothing_has_no_home():
    idle, dense = keras.Variable(1.0), keras.layers.Dense(3, use_bias=False)

    def call(x):
        tf.convert_to_tensor(idle)
        return in_partition(1, dense, x)

    assert variable_homes(*planned(call, X), {}) == {id(dense.kernel): 1}
