from __future__ import annotations

import pytest
import tensorflow as tf

from opensmp import _private
from opensmp.compiler.costs import gradient_costs
from opensmp.compiler.costs.families import FAMILIES
from opensmp.compiler.costs.op_graph import Array, Wiring
from opensmp.compiler.costs.work import Call, Work

X, M, K = [4, 6], [6, 5], [3, 3, 2, 4]
IMAGE = [2, 8, 8, 2]


def normalise(training):
    def call(x, s, b, m, v):
        return tf.raw_ops.FusedBatchNormV3(
            x=x, scale=s, offset=b, mean=m, variance=v, is_training=training
        ).y

    return call


CASES = {
    "MatMul": (tf.matmul, X, M),
    "BatchMatMulV2": (tf.matmul, [2, *X], [2, *M]),
    "Einsum": (lambda a, b: tf.raw_ops.Einsum(inputs=[a, b], equation="ab,bc->ac"), X, M),
    "Conv2D": (lambda x, k: tf.nn.conv2d(x, k, 1, "SAME"), IMAGE, K),
    "DepthwiseConv2dNative": (
        lambda x, k: tf.nn.depthwise_conv2d(x, k, [1] * 4, "SAME"),
        IMAGE,
        [3, 3, 2, 1],
    ),
    "Conv2DBackpropInput": (
        lambda y, k: tf.nn.conv2d_transpose(y, k, [2, 8, 8, 2], 1),
        [2, 8, 8, 4],
        K,
    ),
    "Mul": (tf.multiply, X, X),
    "AddV2": (tf.add, X, [6]),
    "Sub": (tf.subtract, X, X),
    "RealDiv": (tf.divide, X, X),
    "Pow": (tf.pow, X, X),
    "Maximum": (tf.maximum, X, X),
    "SquaredDifference": (tf.math.squared_difference, X, X),
    "BiasAdd": (tf.nn.bias_add, X, [6]),
    "SelectV2": (lambda a, b: tf.where(a > 0, a, b), X, X),
    "AddN": (lambda a, b: tf.add_n([a, b]), X, X),
    "ConcatV2": (lambda a, b: tf.concat([a, b], 1), X, X),
    "Pack": (lambda a, b: tf.stack([a, b]), X, X),
    "FusedBatchNormV3": (normalise(True), IMAGE, [2], [2], [2], [2]),
    "MaxPool": (lambda x: tf.nn.max_pool2d(x, 2, 2, "SAME"), IMAGE),
    "AvgPool": (lambda x: tf.nn.avg_pool2d(x, 2, 2, "SAME"), IMAGE),
    "ResizeBilinear": (lambda x: tf.raw_ops.ResizeBilinear(images=x, size=[4, 4]), IMAGE),
    "Relu": (tf.nn.relu, X),
    "Relu6": (tf.nn.relu6, X),
    "LeakyRelu": (tf.nn.leaky_relu, X),
    "Elu": (tf.nn.elu, X),
    "Selu": (tf.nn.selu, X),
    "Softplus": (tf.nn.softplus, X),
    "Sigmoid": (tf.sigmoid, X),
    "Tanh": (tf.tanh, X),
    "Exp": (tf.exp, X),
    "Log": (tf.math.log, X),
    "Log1p": (tf.math.log1p, X),
    "Sqrt": (tf.sqrt, X),
    "Rsqrt": (tf.math.rsqrt, X),
    "Square": (tf.square, X),
    "Abs": (tf.abs, X),
    "Erf": (tf.math.erf, X),
    "Erfc": (tf.math.erfc, X),
    "Sin": (tf.sin, X),
    "Cos": (tf.cos, X),
    "Neg": (tf.negative, X),
    "Softmax": (tf.nn.softmax, X),
    "LogSoftmax": (tf.nn.log_softmax, X),
    "Sum": (lambda x: tf.reduce_sum(x, 1), X),
    "Mean": (lambda x: tf.reduce_mean(x, 1), X),
    "Max": (lambda x: tf.reduce_max(x, 1), X),
    "Cumsum": (tf.cumsum, X),
    "Cast": (lambda x: tf.cast(x, tf.float64), X),
    "Reshape": (lambda x: tf.reshape(x, [-1]), X),
    "Transpose": (tf.transpose, X),
    "ExpandDims": (lambda x: tf.expand_dims(x, 0), X),
    "Squeeze": (tf.squeeze, [4, 1]),
    "Tile": (lambda x: tf.tile(x, [2, 1]), X),
    "Pad": (lambda x: tf.pad(x, [[1, 1], [0, 0]]), X),
    "Slice": (lambda x: tf.slice(x, [1, 1], [2, 2]), X),
    "StridedSlice": (lambda x: x[1:, ::2], X),
    "Split": (lambda x: tf.split(x, 2)[1], X),
    "Unpack": (lambda x: tf.unstack(x)[1], X),
    "BroadcastTo": (lambda x: tf.broadcast_to(x, [2, 4, 6]), X),
    "GatherV2": (lambda x: tf.gather(x, tf.cast(x[0, :2], tf.int32)), X),
    "GatherNd": (lambda x: tf.gather_nd(x, tf.cast(x[:, :1] * 0, tf.int32)), X),
    "TopKV2": (lambda x: tf.math.top_k(x, 2).values, X),
    "L2Loss": (tf.nn.l2_loss, X),
}

ONLY_THE_FIRST = ("ResizeBilinearGrad", "ResizeBicubicGrad")
"""Gradients that read their first input, and the shape of the second."""


def differentiated(op_type, function, shapes):
    """What the rule says, and which inputs and outputs gradients of all float inputs read."""
    graph = _private.new_graph("rules")
    with graph.as_default():
        inputs = [tf.compat.v1.placeholder(tf.float32, shape) for shape in shapes]
        function(*inputs)
        operations = graph.get_operations()
        (op,) = [op for op in operations if op.type == op_type]
        wanted = [k for k, t in enumerate(op.inputs) if t.dtype.is_floating]
        tf.gradients(op.outputs[0], [op.inputs[k] for k in wanted])
    new = [made for made in graph.get_operations() if made not in set(operations)]
    # Reading no more than the shape of a tensor is not reading it.
    for_shape = ("Shape", "ShapeN", "Size", "ZerosLike")
    read = {
        id(t)
        for made in new
        if made.type not in for_shape
        for t in (made.inputs[:1] if made.type in ONLY_THE_FIRST else made.inputs)
    }
    wiring = Wiring.of(operations, unknown_size=1)
    i = wiring.index[op]
    call = Call(op.type, wiring.input_arrays(i), wiring.arrays[i], op.get_attr)
    said = gradient_costs.reads(call, wanted)
    constants = {k for k, t in enumerate(op.inputs) if t.op.type == "Const"}
    return (
        (set(said[0]) - constants, set(said[1])),
        {k for k, t in enumerate(op.inputs) if id(t) in read} - constants,
        {k for k, t in enumerate(op.outputs) if id(t) in read},
    )


@pytest.mark.parametrize("op_type", CASES)
def test_gradients_read_what_the_rule_says(op_type):
    function, *shapes = CASES[op_type]
    said, inputs, outputs = differentiated(op_type, function, shapes)
    if op_type == "MaxPool":  # the backward pass runs it again instead of keeping its result
        outputs = set()
    assert said == (inputs, outputs)
    assert FAMILIES[op_type].blocks or FAMILIES[op_type].reads is not None


def call_of(op_type, *shapes, out=None):
    arrays = tuple(Array(tuple(shape), 4, True) for shape in shapes)
    made = arrays[0] if out is None else Array(tuple(out), 4, True)
    return Call(op_type, arrays, (made,), {}.__getitem__)


def test_a_product_needs_only_the_factor_of_a_wanted_gradient():
    product = call_of("MatMul", X, M, out=[4, 5])
    assert gradient_costs.reads(product, [0]) == ((1,), ())
    assert gradient_costs.reads(product, [1]) == ((0,), ())
    assert gradient_costs.reads(product, [0, 1]) == ((0, 1), ())


def test_an_unknown_type_keeps_everything():
    unknown = call_of("NobodyKnows", X, X)
    assert gradient_costs.reads(unknown, [1]) == ((0, 1), (0,))
    assert "NobodyKnows" not in FAMILIES


def test_nothing_is_read_for_no_gradient():
    assert gradient_costs.reads(call_of("Pow", X, X), []) == ((), ())
    assert gradient_costs.backward(call_of("Pow", X, X), [], Work(5, 5, 5)) == Work()


def test_each_gradient_of_a_product_is_as_much_work_as_the_product():
    product, forward = call_of("MatMul", X, M, out=[4, 5]), Work(240, 1000, 1)
    assert gradient_costs.backward(product, [0], forward) == forward
    assert gradient_costs.backward(product, [0, 1], forward) == forward * 2


def test_the_gradient_of_a_sum_is_passed_on():
    assert gradient_costs.backward(call_of("AddV2", X, X), [0, 1], Work(24, 288, 1)) == Work()
    bias = gradient_costs.backward(call_of("AddV2", X, [6]), [1], Work(24, 288, 1))
    assert bias.flops == 24  # summed over the batch


def test_the_gradient_of_a_gathered_variable_is_as_small_as_what_was_gathered():
    gather = call_of("GatherV2", [10000, 8], out=[3, 8])
    small = gradient_costs.backward(gather, [0], Work(0, 200, 1), sparse=True)
    large = gradient_costs.backward(gather, [0], Work(0, 200, 1))
    assert small.bytes == 2 * 3 * 8 * 4
    assert large.bytes >= 10000 * 8 * 4


def test_pooling_runs_again_in_the_backward_pass():
    pool, forward = call_of("MaxPool", IMAGE, out=[2, 4, 4, 2]), Work(256, 1280, 1)
    assert gradient_costs.backward(pool, [0], forward).flops > forward.flops
