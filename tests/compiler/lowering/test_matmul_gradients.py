from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from opensmp.compiler.lowering.matmul_gradients import product_of

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype("float32")


def product_in_graph(function, *arrays, stop=()):
    """The product that a function of arrays gives, in a graph; and the graph."""
    with tf.Graph().as_default() as graph:
        inputs = [tf.compat.v1.placeholder(tf.float32, a.shape) for a in arrays]
        return graph, inputs, product_of(function(*inputs), {id(inputs[i]) for i in stop})


def kernel_gradient(x, dy):
    return tf.matmul(x, dy, transpose_a=True)


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (kernel_gradient, [(3, 5), (3, 4)]),
        (lambda x, dy: tf.matmul(x, dy), [(5, 3), (3, 4)]),
        (lambda x, dy: tf.matmul(x, dy, transpose_b=True), [(5, 3), (4, 3)]),
        (lambda x, dy: tf.matmul(x, dy, transpose_a=True, transpose_b=True), [(3, 5), (4, 3)]),
        (lambda x, dy: tf.reshape(kernel_gradient(x, dy), [5, 2, 2]), [(3, 5), (3, 4)]),
        (lambda x, dy: tf.identity(kernel_gradient(x, dy)), [(3, 5), (3, 4)]),
        (lambda x, dy: tf.einsum("abc,abde->cde", x, dy), [(3, 2, 5), (3, 2, 4, 2)]),
        (lambda x, dy: tf.einsum("abc,bda->cd", x, dy), [(3, 2, 5), (2, 4, 3)]),
    ],
)
def test_factors_below_each_other_give_the_sum_of_the_products(function, shapes):
    first = [normal(*shape) for shape in shapes]
    second = [normal(*shape) for shape in shapes]
    _, inputs, product = product_in_graph(function, *first)
    assert all(t is i for t, i in zip(product.factors, inputs, strict=True))
    columns = zip(first, second, product.axes, strict=True)
    joined = [np.concatenate([one, other], axis) for one, other, axis in columns]
    expected = function(*first) + function(*second)
    np.testing.assert_allclose(function(*joined), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: x * y,
        lambda x, y: 2.0 * tf.matmul(x, y),
        lambda x, y: tf.matmul(x, x),
        lambda x, y: tf.einsum("ab,ab->ab", x, y),
        lambda x, y: tf.einsum("...b,bc->...c", x, y),
        lambda x, y: tf.einsum("aa,ab->b", x, y),
        lambda x, y: tf.einsum("ab->b", x),
        lambda x, y: tf.IndexedSlices(x, tf.range(3)),
    ],
)
def test_what_is_no_product_of_rows(function):
    assert product_in_graph(function, normal(3, 3), normal(3, 3))[2] is None


def test_nothing_behind_a_feed_is_looked_at():
    assert product_in_graph(lambda x, y: x, normal(3, 3), normal(3, 3), stop=[0])[2] is None


@pytest.mark.parametrize(
    ("rows", "worth"), [(1, True), (16, True), (17, False), (64, False), (None, False)]
)
def test_few_rows_are_worth_it(rows, worth):
    with tf.Graph().as_default():
        x, dy = (tf.compat.v1.placeholder(tf.float32, [rows, 64]) for _ in range(2))
        assert product_of(kernel_gradient(x, dy), ()).is_worth_joining is worth
