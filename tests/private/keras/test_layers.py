"""Canaries of layers and their calls."""

from __future__ import annotations

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf

from opensmp import _private


def test_in_stateless_scope():
    assert not _private.in_stateless_scope()
    with keras.StatelessScope():
        assert _private.in_stateless_scope()


def test_in_symbolic_scope():
    seen = []

    class Asks(keras.layers.Layer):
        def call(self, x):
            seen.append(_private.in_symbolic_scope())
            return x

    layer = Asks()
    layer(keras.Input([2]))
    layer(tf.ones([2]))
    assert seen == [True, False]


def test_forget_compiled_functions():
    inner = keras.Sequential([keras.layers.Dense(1)])
    model = keras.Sequential([inner])
    for each in (model, inner):
        each.compile("sgd", "mse")
        each.predict(tf.ones([1, 1]), verbose=0)
        assert each.predict_function is not None
    _private.forget_compiled_functions(model)
    assert model.predict_function is inner.predict_function is None
    assert model.predict(tf.ones([1, 1]), verbose=0).shape == (1, 1)


def test_forget_compiled_functions__of_models_with_moved_variables():
    inner = keras.Sequential([keras.layers.Dense(1)])
    model = keras.Sequential([inner, keras.layers.Dense(1)])
    for each in (model, inner):
        each.compile("sgd", "mse")
        each.predict(tf.ones([1, 1]), verbose=0)
    _private.forget_compiled_functions(model, {id(model.layers[-1].kernel)})
    assert model.predict_function is None
    assert inner.predict_function is not None


def test_layers_inside():
    inner = keras.Sequential([keras.layers.Dense(1)])
    model = keras.Sequential([keras.Input([1]), inner])
    assert inner in _private.layers_inside(model)
    assert not any(layer in _private.layers_inside(model) for layer in inner.layers)
    assert _private.layers_inside(keras.layers.Dense(1)) == []


def test_own_variables():
    normal = keras.layers.BatchNormalization()
    model = keras.Sequential([keras.Input([2]), normal])
    assert _private.own_variables(model) == []
    assert {id(v) for v in _private.own_variables(normal)} == {id(v) for v in normal.variables}


def test_get_mask():
    embedded = keras.layers.Embedding(3, 1, mask_zero=True)(tf.constant([[1, 0]]))
    assert _private.get_mask(embedded).numpy().tolist() == [[True, False]]
    assert _private.get_mask(tf.ones([2])) is None


def test_set_mask():
    x = tf.constant([[[2.0], [4.0]]])
    _private.set_mask(x, tf.constant([[True, False]]))
    assert keras.layers.GlobalAveragePooling1D()(x).numpy().tolist() == [[2.0]]


def test_get_logits():
    logits = tf.constant([[1.0, 2.0]])
    for probabilities in (keras.activations.softmax(logits), keras.activations.sigmoid(logits)):
        assert _private.get_logits(probabilities).numpy().tolist() == [[1.0, 2.0]]
    assert _private.get_logits(tf.ones([2])) is None


def test_set_logits():
    labels, logits = tf.constant([0]), tf.constant([[-200.0, 200.0]])
    probabilities = tf.nn.softmax(logits)
    loss = keras.losses.sparse_categorical_crossentropy
    without = float(loss(labels, probabilities)[0])
    _private.set_logits(probabilities, logits)
    assert float(loss(labels, probabilities)[0]) == 400.0
    assert without < 100.0


def test_regularization_losses():
    layer = keras.layers.Dense(
        1, kernel_initializer="ones", kernel_regularizer=keras.regularizers.L2(2.0)
    )
    model = keras.Sequential([layer, keras.layers.ActivityRegularization(l1=1.0)])
    model(tf.ones([1, 1]))
    assert [float(loss) for loss in _private.regularization_losses(model)] == [2.0]
    assert len(model.losses) == 2


def test_order_losses():
    first = keras.layers.ActivityRegularization(l1=1.0)
    second = keras.layers.ActivityRegularization(l1=10.0)

    class Backwards(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.second = first, second

        def call(self, x):
            return self.first(self.second(x))

    model = Backwards()
    with keras.StatelessScope(collect_losses=True) as scope:
        model(tf.ones([1, 1]))
        assert [float(loss) for loss in scope.losses] == [10.0, 1.0]
        _private.order_losses(model)
        assert [float(loss) for loss in scope.losses] == [1.0, 10.0]


def test_own_losses():
    inner = keras.layers.Dense(1, kernel_regularizer="l2", activity_regularizer="l1")
    inner.build((None, 1))
    inner.kernel.assign([[2.0]])
    model = keras.Sequential([keras.layers.ActivityRegularization(l1=10.0), inner])
    model(tf.ones([1, 1]))
    assert [float(loss) for loss in _private.own_losses(model)] == [10.0, pytest.approx(0.02)]


def test_is_variable_creation_error():
    with pytest.raises(ValueError) as caught, keras.StatelessScope():  # noqa: PT011
        keras.Variable(np.ones(2))
    assert _private.is_variable_creation_error(caught.value)
    assert not _private.is_variable_creation_error(ValueError("something else"))


def test_layer_calls():
    seen = []

    @contextlib.contextmanager
    def around(layer):
        seen.append(f"+{layer.name}")
        yield
        seen.append(f"-{layer.name}")

    inner = keras.layers.Dense(1, name="inner")
    model = keras.Sequential([inner], name="outer")
    model.build((None, 1))
    with _private.layer_calls(around):
        model(tf.ones([1, 1]))
    assert seen[0] == "+outer"
    assert seen[-1] == "-outer"
    assert seen.index("+inner") < seen.index("-inner")
    model(tf.ones([1, 1]))
    assert seen[-1] == "-outer"
    count = len(seen)
    model(tf.ones([1, 1]))
    assert len(seen) == count


def test_functional_nodes():
    shared = keras.layers.Dense(2, name="shared")
    inputs = keras.Input([2])
    middle = shared(inputs)
    model = keras.Model(inputs, shared(middle) + middle)
    seen = []

    @contextlib.contextmanager
    def around(node):
        seen.append(node)
        yield

    with _private.functional_nodes(around):
        model(tf.ones([1, 2]))
    assert [node.operation.name.split("_")[0] for node in seen] == ["shared", "shared", "add"]
    assert len(set(map(id, seen))) == 3
    assert seen[0].outputs[0] is middle


def test_new_nodes():
    made = []
    with _private.new_nodes(made.append):
        inputs = keras.Input([2])
        keras.layers.Dense(1, name="dense")(inputs)
    keras.layers.Dense(1)(inputs)
    assert [node.operation.name for node in made][-1] == "dense"


def test_eager_builds():
    class Keeps(keras.layers.Layer):
        def build(self, shape):
            assert tf.executing_eagerly()
            self.kept = tf.range(float(shape[-1]))

        def call(self, x):
            return x + self.kept

    class Outer(keras.Model):
        def __init__(self):
            super().__init__()
            self.keeps = Keeps()

        def call(self, x):
            return self.keeps(x)

    model = Outer()

    @tf.function
    def run(x):
        with _private.eager_builds():
            return model(x)

    assert run(tf.zeros([1, 3])).numpy().tolist() == [[0.0, 1.0, 2.0]]
    assert run(tf.zeros([2, 3])).shape == (2, 3)  # a second trace uses what the first one kept


def test_all_layers():
    inner = keras.Sequential([keras.layers.Dense(1)])
    model = keras.Sequential([inner])
    assert _private.all_layers(model)[0] is model
    assert inner.layers[0] in _private.all_layers(model)


def test_layer_calls_by():
    layer, seen = keras.layers.Rescaling(2.0), []

    def run(called, call, args, kwargs):
        seen.append(called)
        return call(called, *args, **kwargs) + 1.0

    with _private.layer_calls_by(run):
        assert layer(tf.ones([1])).numpy() == 3.0
    assert layer(tf.ones([1])).numpy() == 2.0
    assert seen == [layer]


def test_makes_variables():
    dense = keras.layers.Dense(1)
    assert _private.makes_variables(dense)
    dense.build((None, 2))
    assert _private.makes_variables(dense)
    assert _private.makes_variables(keras.Sequential([keras.layers.Dense(1)]))
    assert not _private.makes_variables(keras.layers.Flatten())


def test_keep_losses():
    inner = keras.layers.Dense(2, activity_regularizer="l2")
    model = keras.Sequential([keras.Input((3,)), inner, keras.layers.Dense(1)])
    model(np.ones((1, 3)))
    assert len(model.losses) == 1
    loss = tf.constant(5.0)
    _private.keep_losses(model, [model.layers[1]], [loss])
    assert inner.losses == []
    assert model.losses[0] is model.layers[1].losses[0] is loss
