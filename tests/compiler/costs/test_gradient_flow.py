from __future__ import annotations

import tensorflow as tf

from opensmp import _private
from opensmp.compiler.costs.gradient_flow import GradientFlow
from opensmp.compiler.costs.op_graph import Wiring


def flow(function, *shapes, leaves=(0,)):
    """The flow from the results of `function` to some of its arguments, and the types."""
    graph = _private.new_graph("flow")
    with graph.as_default():
        inputs = [tf.compat.v1.placeholder(tf.float32, shape) for shape in shapes]
        results = tf.nest.flatten(function(*inputs))
    wiring = Wiring.of(graph.get_operations(), 1)
    ports = [(wiring.index[t.op], t.value_index) for t in results]
    found = GradientFlow.of(wiring, {wiring.index[inputs[k].op] for k in leaves}, ports)
    return found, wiring


def wanted(function, *shapes, leaves=(0,)):
    found, wiring = flow(function, *shapes, leaves=leaves)
    return {kind: slots for kind, slots in zip(wiring.types, found.wanted, strict=True) if slots}


def test_gradients_flow_from_results_to_leaves_only():
    def call(w, x):
        before = tf.tanh(x)  # at no leaf
        after = tf.exp(before * w)
        tf.sin(w)  # at no result
        return after

    assert wanted(call, [3], [3]) == {"Mul": (1,), "Exp": (0,)}
    assert wanted(call, [3], [3], leaves=(1,)) == {"Mul": (0,), "Exp": (0,), "Tanh": (0,)}
    assert wanted(call, [3], [3], leaves=()) == {}


def test_no_gradient_flows_through_a_stop_or_an_integer():
    assert wanted(lambda w: tf.exp(tf.stop_gradient(tf.tanh(w))), [3]) == {}
    assert wanted(lambda w: tf.cast(tf.argmax(tf.tanh(w)), tf.float32), [3]) == {}
    assert wanted(lambda w: tf.where(w > 0, 1.0, 2.0) * tf.floor(w), [3]) == {}


def test_an_operation_behind_a_custom_gradient_has_none_of_its_own():
    @tf.custom_gradient
    def swish(x):
        return x * tf.sigmoid(x), lambda dy: dy

    found, wiring = flow(lambda w: tf.exp(swish(tf.tanh(w))), [3])
    kinds = {wiring.types[i] for i in found.hidden}
    assert kinds == {"Mul", "Sigmoid"}
    assert {wiring.types[i] for i in found.custom} == {"IdentityN"}
    assert found.wanted[wiring.types.index("Tanh")] == (0,)


def test_a_tensor_with_two_readers_has_two_gradients():
    found, wiring = flow(lambda w: tf.exp(tf.tanh(w)) + tf.sin(tf.tanh(w)), [3])
    assert found.summed(wiring) == {}  # a tanh each, and the leaf is the caller's

    def call(w):
        shared = tf.tanh(w)
        return tf.exp(shared) + tf.sin(shared)

    found, wiring = flow(call, [3])
    assert found.summed(wiring) == {(wiring.types.index("Tanh"), 0): 2}
