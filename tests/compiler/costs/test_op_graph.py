from __future__ import annotations

import tensorflow as tf

from opensmp import _private
from opensmp.compiler.costs.op_graph import Array, Wiring


def wiring(function, *shapes, unknown_size=32):
    graph = _private.new_graph("wiring")
    with graph.as_default():
        function(*(tf.compat.v1.placeholder(tf.float32, shape) for shape in shapes))
    return Wiring.of(graph.get_operations(), unknown_size)


def shapes(made, op_type):
    return [made.arrays[i][0].shape for i, kind in enumerate(made.types) if kind == op_type]


def test_operations_read_outputs_of_earlier_ones():
    made = wiring(lambda x: tf.split(x, 2)[1] + 1.0, [4, 6])
    add, split = made.types.index("AddV2"), made.types.index("Split")
    assert made.inputs[add][0] == (split, 1)
    assert made.array((split, 1)) == Array((2, 6), 4, True)
    assert made.producers(add) == [split, made.inputs[add][1][0]]


def test_control_edges_are_waited_for():
    def call(x):
        with tf.control_dependencies([tf.tanh(x)]):
            return tf.exp(x)

    made = wiring(call, [2])
    assert made.controls[made.types.index("Exp")] == (made.types.index("Tanh"),)


def test_sizes_in_bytes():
    made = wiring(lambda x: (tf.cast(x, tf.float16), tf.argmax(x), x > 0), [3, 5])
    sizes = {kind: made.arrays[i][0] for i, kind in enumerate(made.types)}
    assert sizes["Cast"].nbytes == 30
    assert sizes["ArgMax"] == Array((5,), 8, False)
    assert sizes["Greater"].nbytes == 15


def test_handles_have_no_size_but_pass_gradients():
    made = wiring(lambda x: tf.raw_ops.TensorListFromTensor(tensor=x, element_shape=[5]), [3, 5])
    (handle,) = made.arrays[made.types.index("TensorListFromTensor")]
    assert (handle.nbytes, handle.differentiable) == (0, True)


def test_unknown_dimensions_have_the_given_size():
    made = wiring(lambda x: tf.tanh(x), [None, 6], unknown_size=7)
    assert shapes(made, "Tanh") == [(7, 6)]


def test_a_flattened_batch_keeps_its_elements():
    def call(x, kernel):
        flat = tf.reshape(x, [-1, 6])
        product = tf.matmul(flat, kernel)
        return tf.nn.relu(product)

    made = wiring(call, [None, 10, 6], [6, 3], unknown_size=4)
    assert shapes(made, "Reshape") == [(40, 6)]
    assert shapes(made, "MatMul") == [(40, 3)]
    assert shapes(made, "Relu") == [(40, 3)]


def test_an_unknown_rank_counts_as_a_scalar():
    made = wiring(lambda x: tf.tanh(x), None)
    assert shapes(made, "Tanh") == [()]
