from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from opensmp import _private
from opensmp.compiler.costs.families import FAMILIES
from opensmp.compiler.costs.op_costs import default, formula, narrow_flops
from opensmp.compiler.costs.op_graph import Array, Wiring
from opensmp.compiler.costs.work import Call, Work


def calls(function, *shapes):
    """The operations of `function` of float32 placeholders, with the operations themselves."""
    graph = _private.new_graph("formulas")
    with graph.as_default():
        function(*(tf.compat.v1.placeholder(tf.float32, shape) for shape in shapes))
    wiring = Wiring.of(graph.get_operations(), unknown_size=1)
    return [
        (op, Call(op.type, wiring.input_arrays(i), wiring.arrays[i], op.get_attr))
        for i, op in enumerate(wiring.operations)
    ]


def call(op_type, function, *shapes):
    """The one operation of a type that `function` makes."""
    (found,) = [made for op, made in calls(function, *shapes) if op.type == op_type]
    return found


WITH_STATISTICS = {
    "MatMul": (lambda a, b: tf.matmul(a, b, transpose_a=True), [3, 2], [3, 5]),
    "BatchMatMulV2": (lambda a, b: tf.matmul(a, b, transpose_b=True), [4, 2, 3], [4, 5, 3]),
    "Conv2D": (lambda x, k: tf.nn.conv2d(x, k, 2, "SAME"), [2, 9, 9, 4], [3, 3, 2, 6]),
    "Conv3D": (
        lambda x, k: tf.nn.conv3d(x, k, [1] * 5, "VALID"),
        [2, 5, 6, 7, 2],
        [2, 3, 3, 2, 4],
    ),
    "DepthwiseConv2dNative": (
        lambda x, k: tf.nn.depthwise_conv2d(x, k, [1] * 4, "SAME"),
        [2, 8, 8, 4],
        [3, 3, 4, 2],
    ),
    "Conv2DBackpropInput": (
        lambda y, k: tf.nn.conv2d_transpose(y, k, [2, 8, 8, 3], 2),
        [2, 4, 4, 5],
        [3, 3, 3, 5],
    ),
    "AvgPool": (lambda x: tf.nn.avg_pool2d(x, 3, 2, "SAME"), [2, 9, 9, 4]),
    "MaxPool": (lambda x: tf.nn.max_pool2d(x, 2, 2, "VALID"), [2, 8, 8, 4]),
    "Softmax": (tf.nn.softmax, [4, 7]),
    "Mean": (lambda x: tf.reduce_mean(x, 1), [4, 7]),
    "AddV2": (lambda a, b: a + b, [4, 7], [7]),
    "Mul": (lambda a, b: a * b, [4, 7], [4, 1]),
    "BiasAdd": (tf.nn.bias_add, [4, 7], [7]),
    "SquaredDifference": (tf.math.squared_difference, [4, 7], [7]),
    "Maximum": (tf.maximum, [4, 7], [4, 7]),
    "ArgMax": (tf.argmax, [4, 7]),
}


@pytest.mark.parametrize("op_type", WITH_STATISTICS)
def test_formulas_agree_with_tensorflows_statistics(op_type):
    function, *shapes = WITH_STATISTICS[op_type]
    ((op, made),) = [(op, made) for op, made in calls(function, *shapes) if op.type == op_type]
    statistics = _private.registered_flops(
        op, [a.shape for a in made.inputs], [a.shape for a in made.outputs]
    )
    flops, num_bytes = formula(made)
    # Reductions need one addition less than there are elements; statistics subtract it.
    assert flops == pytest.approx(statistics, abs=made.outputs[0].elements)
    assert num_bytes == made.read + made.written


def test_a_matrix_product_is_two_flops_per_product():
    made = call("MatMul", tf.matmul, [8, 16], [16, 32])
    assert formula(made) == (2 * 8 * 16 * 32, 4 * (8 * 16 + 16 * 32 + 8 * 32))


@pytest.mark.parametrize(
    ("equation", "shapes", "products"),
    [
        ("abc,cd->abd", ([2, 3, 4], [4, 5]), 2 * 3 * 4 * 5),
        ("...c,cd->...d", ([2, 3, 4], [4, 5]), 2 * 3 * 4 * 5),
        ("bqhd,bkhd->bhqk", ([2, 6, 3, 4], [2, 5, 3, 4]), 2 * 6 * 3 * 4 * 5),
        ("ab,ac->bc", ([7, 2], [7, 3]), 7 * 2 * 3),
    ],
)
def test_an_einsum_is_two_flops_per_product(equation, shapes, products):
    made = call("Einsum", lambda a, b: tf.raw_ops.Einsum(inputs=[a, b], equation=equation), *shapes)
    assert formula(made)[0] == 2 * products
    path = np.einsum_path(equation, *(np.ones(s) for s in shapes), optimize=False)[1]
    naive = float(path.split("Naive FLOP count:")[1].split()[0])
    assert formula(made)[0] == pytest.approx(naive, rel=1e-3)


def test_a_transposed_convolution_is_as_much_work_as_the_convolution():
    forward = call("Conv2D", lambda x, k: tf.nn.conv2d(x, k, 2, "SAME"), [2, 8, 8, 3], [3, 3, 3, 5])
    back = call(
        "Conv2DBackpropInput",
        lambda y, k: tf.nn.conv2d_transpose(y, k, [2, 8, 8, 3], 2),
        [2, 4, 4, 5],
        [3, 3, 3, 5],
    )
    assert formula(forward)[0] == formula(back)[0]


@pytest.mark.parametrize("op_type", ["GatherV2", "StridedSlice", "Slice"])
def test_picking_touches_what_it_returns_and_not_the_table(op_type):
    function = {
        "GatherV2": lambda table: tf.gather(table, tf.constant([1, 5, 1])),
        "StridedSlice": lambda table: table[:3],
        "Slice": lambda table: tf.slice(table, [0, 0], [3, 10]),
    }[op_type]
    flops, num_bytes = formula(call(op_type, function, [1000, 10]))
    assert flops == 0
    assert 2 * 3 * 10 * 4 <= num_bytes < 2 * 3 * 10 * 4 + 100


def test_shapes_and_views_cost_nothing():
    for op_type, function in {
        "Reshape": lambda x: tf.reshape(x, [-1]),
        "Shape": tf.shape,
        "ExpandDims": lambda x: x[None, :],
        "StopGradient": tf.stop_gradient,
    }.items():
        found = [made for op, made in calls(function, [8, 8]) if op.type == op_type]
        assert all(formula(made) == (0, 0) for made in found)


def test_random_numbers_cost_more_than_additions():
    made = call("StatelessRandomUniformV2", lambda x: tf.random.stateless_uniform([50], [1, 2]), [])
    assert formula(made) == (21 * 50, 4 * 50)


def test_a_fourier_transform_is_5_n_log_n():
    made = call("FFT2D", lambda x: tf.signal.fft2d(tf.cast(x, tf.complex64)), [3, 8, 16])
    assert formula(made)[0] == 3 * 5 * 128 * 7


def test_batch_normalisation_is_more_work_in_training():
    def normalise(training):
        return lambda x, s: tf.raw_ops.FusedBatchNormV3(
            x=x, scale=s, offset=s, mean=s, variance=s, is_training=training
        )

    trained = formula(call("FusedBatchNormV3", normalise(True), [2, 4, 4, 3], [3]))
    fixed = formula(call("FusedBatchNormV3", normalise(False), [2, 4, 4, 3], [3]))
    assert (trained[0], fixed[0]) == (6 * 96, 2 * 96)
    assert trained[1] > fixed[1]


def test_an_unknown_type_counts_as_elementwise():
    x = Array((3, 4), 4, True)
    made = Call("NobodyKnows", (x, x), (x,), {}.__getitem__)
    assert formula(made) is None
    assert default(made) == (12, 3 * 48)


@pytest.mark.parametrize(("of_group", "narrow"), [(1, 720), (2, 360), (6, 0)])
def test_a_convolution_of_groups_is_narrow_by_the_channels_of_a_group(of_group, narrow):
    made = call(
        "Conv2D", lambda x, k: tf.nn.conv2d(x, k, 1, "SAME"), [2, 5, 5, 6], [3, 3, of_group, 6]
    )
    assert narrow_flops(made, 720) == narrow


def test_only_convolutions_are_narrow():
    made = call(
        "DepthwiseConv2dNative",
        lambda x, k: tf.nn.depthwise_conv2d(x, k, [1] * 4, "SAME"),
        [2, 8, 8, 4],
        [3, 3, 4, 1],
    )
    assert narrow_flops(made, 720) == 0


def test_work_adds_up_and_multiplies():
    assert Work(1, 2, 3, 4) + Work(10, 20, 30, 40) * 2 == Work(21, 42, 63, 84)


def test_no_type_has_two_formulas():
    assert sum(len(family.names.split()) for family in set(FAMILIES.values())) == len(FAMILIES)
    assert len(FAMILIES) > 300
    assert {"Relu", "Reshape", "Transpose", "Sum"} <= set(FAMILIES)
