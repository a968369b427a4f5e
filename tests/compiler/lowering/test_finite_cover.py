"""What is not read is finite all the same: each operation that is relied on, and random graphs."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from opensmp.compiler.lowering import finite_flags as flags_module
from opensmp.compiler.lowering.finite_cover import _SPREADING, tensors_to_read
from opensmp.compiler.lowering.finite_flags import finite_flags

BAD = [np.nan, np.inf, -np.inf]

# Operation type -> its floating inputs -> output, of inputs of shape [3, 3].
OPERATIONS: dict[str, Callable[..., Any]] = {
    "Add": lambda x, y: tf.raw_ops.Add(x=x, y=y),
    "AddN": lambda x, y: tf.add_n([x, y]),
    "AddV2": lambda x, y: tf.raw_ops.AddV2(x=x, y=y),
    "BatchMatMulV2": lambda x, y: tf.matmul(x[None], y[None]),
    "BiasAdd": lambda x, y: tf.nn.bias_add(x, tf.reshape(y, [9])[:3]),
    "BiasAddGrad": lambda x: tf.raw_ops.BiasAddGrad(out_backprop=x),
    "Cast": lambda x: tf.cast(x, tf.float16),
    "ConcatV2": lambda x, y: tf.concat([x, y], 1),
    "Einsum": lambda x, y: tf.einsum("ab,cb->ac", x, y),
    "ExpandDims": lambda x: tf.expand_dims(x, 1),
    "Identity": tf.identity,
    "MatMul": lambda x, y: tf.matmul(x, y, transpose_b=True),
    "Mean": lambda x: tf.reduce_mean(x, 0),
    "Mul": lambda x, y: x * y,
    "Neg": lambda x: -x,
    "Pack": lambda x, y: tf.stack([x, y]),
    "PreventGradient": lambda x: tf.raw_ops.PreventGradient(input=x),
    "Reshape": lambda x: tf.reshape(x, [9]),
    "Square": tf.square,
    "SquaredDifference": lambda x, y: tf.math.squared_difference(x, y),
    "Squeeze": lambda x: tf.squeeze(tf.reshape(x, [1, 9])),
    "StopGradient": tf.stop_gradient,
    "Sub": lambda x, y: x - y,
    "Sum": lambda x: tf.reduce_sum(x, 1),
    "Transpose": lambda x: tf.transpose(x),
}


def test_every_operation_that_is_relied_on_is_tried():
    assert set(OPERATIONS) == _SPREADING | {"Cast", "Einsum"}


@pytest.mark.parametrize("kind", OPERATIONS)
def test_a_bad_element_of_any_input_makes_the_result_bad(kind):
    function = OPERATIONS[kind]
    count = function.__code__.co_argcount if "lambda" in function.__name__ else 1
    compiled = tf.function(function)
    graph = compiled.get_concrete_function(*[tf.TensorSpec([3, 3])] * count).graph
    assert kind in {op.type for op in graph.get_operations()}
    for position in range(count):
        for place in range(3 if (kind, position) == ("BiasAdd", 1) else 9):
            for bad in BAD:
                for other in (0.0, -1.0, np.inf):
                    inputs = [np.full(9, other, np.float32) for _ in range(count)]
                    inputs[position] = np.ones(9, np.float32)
                    inputs[position][place] = bad
                    result = compiled(*[tf.constant(each.reshape(3, 3)) for each in inputs])
                    assert not np.isfinite(result.numpy()).all()


def test_a_product_with_constant_zeros_is_not_relied_on():
    @tf.function
    def flags(x):
        bad = tf.identity(x)
        return finite_flags([bad, tf.zeros([3, 3]) * bad, bad - bad, bad + 1.0 - bad])

    found = flags(tf.constant([[np.nan] * 3] * 3)).numpy()
    assert not found[0]


def read_in(function: Callable[..., Any], *shapes: list[int]) -> list[str]:
    names: list[str] = []

    def traced(*args: Any) -> Any:
        names.extend(t.op.name for t in tensors_to_read(function(*args)))
        return 0

    specs = [tf.TensorSpec(shape, name=f"x{i}") for i, shape in enumerate(shapes)]
    tf.function(traced).get_concrete_function(*specs)
    return names


def test_what_is_read():
    def backward(x, dy, weight):
        dx = tf.matmul(dy, weight, transpose_b=True, name="dx")
        dw = tf.matmul(x, dy, transpose_a=True, name="dw")
        return [dy, dw, tf.raw_ops.BiasAddGrad(out_backprop=dy, name="db"), dx]

    few, many = [4, 64], [640, 64]
    assert read_in(backward, few, few, [64, 64]) == ["x0", "x1", "dx"]  # the factors are smaller
    assert read_in(backward, many, many, [64, 64]) == ["dw", "dx", "db"]

    def forward(x):
        h = tf.reshape(x, [64, 4]) * 2.0
        return [h, tf.nn.relu(h, name="relu"), tf.add(h, 1.0, name="sum")]

    assert read_in(forward, few) == ["relu", "sum"]


@pytest.mark.parametrize("seed", range(20))
def test_random_graphs_have_the_flags_of_each(seed):
    draw = random.Random(seed)
    others = [tf.nn.relu, tf.tanh, tf.nn.softmax, lambda x: x[:1] + 0 * x, lambda x: x / 3.0]

    @tf.function
    def both(x, bad, where):
        tensors = [x]
        for index in range(12):
            a, b = draw.choice(tensors), draw.choice(tensors)
            kind = draw.choice([*OPERATIONS, *others])
            if isinstance(kind, str):
                function = OPERATIONS[kind]
                two = "lambda" in function.__name__ and function.__code__.co_argcount == 2
                result = function(a, b) if two else function(a)
            else:
                result = kind(a)
            result = tf.cast(tf.reshape(result, [-1]), tf.float32)[:9]
            result = tf.concat([result, tf.zeros(9 - result.shape[0])], 0)
            here = tf.reshape(
                tf.one_hot(draw.randrange(9), 9, dtype=tf.bool, on_value=True, off_value=False), [9]
            )
            result = tf.where(here & (where == index), bad, result)
            tensors.append(tf.reshape(result, [3, 3]))
        checked = draw.sample(tensors, 6)
        return finite_flags(checked), flags_module._flags_of_each(checked)

    x = tf.constant(np.random.default_rng(seed).normal(size=(3, 3)), tf.float32)
    for where in range(13):
        for bad in BAD:
            flags, of_each = both(x, tf.constant(bad, tf.float32), tf.constant(where))
            np.testing.assert_array_equal(flags, of_each)


def test_large_values_are_read_one_by_one():
    flags = tf.function(finite_flags)
    large = tf.fill([100], 1e25)
    assert flags([large, large, large]).numpy().tolist() == [True] * 3
    assert flags([large, large / 0.0, large]).numpy().tolist() == [True, False, True]


def test_a_product_that_overflows_is_found_by_its_factors():
    @tf.function
    def flags(x, dy):
        dw = tf.matmul(x, dy, transpose_a=True)
        return finite_flags([dw, tf.reduce_sum(dy, 0), tf.square(x)])

    x, dy = tf.fill([2, 64], 1e20), tf.fill([2, 64], 1e20)
    assert flags(x, dy).numpy().tolist() == [False, True, False]
    assert flags(x * 1e-20, dy * 1e-20).numpy().all()
