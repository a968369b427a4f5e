from __future__ import annotations

import importlib.util

import keras
import numpy as np
import pytest
import tensorflow as tf
from small import traced
from zoo.models import ZOO, by_size

from opensmp.compiler.costs.families import ALIASES
from opensmp.compiler.costs.graph_costs import graph_costs, trainable_placeholders
from opensmp.compiler.lowering.program import Program
from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.trace.trace import trace

QUICK = ["VGG16", "MobileNetV2", "ConvNeXtTiny", "BertBackbone", "T5Backbone", "MixtralBackbone"]


def flops(graph, **kwargs):
    costs = graph_costs(graph, **kwargs)
    return sum(w.flops for w in costs.forward), sum(w.flops for w in costs.backward)


def by_type(graph, **kwargs):
    """Type to (forward, backward) FLOPs and residual bytes of the only operation of the type."""
    costs = graph_costs(graph, **kwargs)
    return {
        kind: (f.flops, b.flops, int(r))
        for kind, f, b, r in zip(
            costs.wiring.types, costs.forward, costs.backward, costs.residual_bytes, strict=True
        )
    }


def traced_with(layer, shape):
    """The graph of one call whose input has dimensions that are not known."""
    found = []

    @tf.function(input_signature=[tf.TensorSpec(shape)], autograph=False)
    def run(x):
        found.append(traced(layer, x))
        return x

    run.get_concrete_function()
    return found[0]


def zoo_graph(name):
    entry = ZOO[name]
    if entry.family == "keras_hub" and importlib.util.find_spec("keras_hub") is None:
        pytest.skip("keras_hub is not installed")
    with keras.StatelessScope(initialize_variables=False):
        model = entry.build()
    inputs, _ = entry.batch(np.random.default_rng(0), 2)
    inputs = tf.nest.map_structure(tf.convert_to_tensor, inputs)
    return trace(model.__call__, [inputs], {"training": True}, name=model.name)


# --- FLOPs and bytes ------------------------------------------------------------------------


def test_a_dense_layer():
    graph = traced(keras.layers.Dense(5), tf.ones([8, 3]))
    forward, backward, residual = by_type(graph)["MatMul"]
    assert (forward, backward) == (2 * 8 * 3 * 5, 2 * 8 * 3 * 5)  # no gradient of the input
    assert residual == 8 * 3 * 4  # the input


def test_both_gradients_of_a_product_cost_twice_the_product():
    layers = keras.Sequential([keras.layers.Dense(4), keras.layers.Dense(5)])
    costs = graph_costs(traced(layers, tf.ones([8, 3])))
    first, second = [i for i, kind in enumerate(costs.wiring.types) if kind == "MatMul"]
    assert costs.backward[first].flops == costs.forward[first].flops
    assert costs.backward[second].flops == 2 * costs.forward[second].flops


def test_inference_has_no_backward_pass():
    graph = traced(keras.layers.Dense(5), tf.ones([8, 3]))
    costs = graph_costs(graph, required=())
    assert sum(w.flops + w.bytes + w.launches for w in costs.backward) == 0
    assert not costs.residual_bytes.any()


def test_frozen_layers_have_no_backward_pass_before_the_first_trained_one():
    layers = [keras.layers.Dense(3), keras.layers.Dense(3), keras.layers.Dense(3)]
    layers[0].trainable = layers[2].trainable = False
    costs = graph_costs(traced(keras.Sequential(layers), tf.ones([8, 3])))
    products = [i for i, kind in enumerate(costs.wiring.types) if kind == "MatMul"]
    once = 2 * 8 * 3 * 3
    # The last one passes the gradient on to the second one, which stops it.
    assert [costs.backward[i].flops for i in products] == [0, once, once]


def test_what_no_result_needs_costs_nothing():
    def call(x):
        tf.exp(x)
        return tf.tanh(x)

    found = by_type(traced(call, tf.ones([8, 3])))
    assert (found["Exp"][0], found["Tanh"][0]) == (0, 24)


def test_an_open_batch_has_the_given_size():
    layer = keras.layers.Dense(5)
    known = flops(traced(layer, tf.ones([16, 3])))
    graph = traced_with(layer, [None, 3])
    assert flops(graph, unknown_size=16) == known
    assert flops(graph) == (2 * known[0], 2 * known[1])  # 32


def test_a_loop_costs_its_body_once_for_each_iteration():
    layer = keras.layers.LSTM(4)
    short = flops(traced(layer, tf.ones([2, 5, 3])))
    long = flops(traced(layer, tf.ones([2, 10, 3])))
    step = 2 * 2 * (3 + 4) * 16  # two products with kernels of 4 x 4 columns
    assert 5 * step < short[0] < 1.6 * 5 * step
    assert long[0] == pytest.approx(2 * short[0], rel=0.05)
    assert 1.5 < short[1] / short[0] < 3


def test_a_branch_costs_the_larger_of_its_functions():
    kernel = tf.Variable(tf.ones([3, 3]))

    def call(x):
        product = tf.cond(tf.reduce_sum(x) > 0, lambda: x @ kernel, lambda: x + 1.0)
        return product

    found = by_type(traced(call, tf.ones([8, 3])))["StatelessIf"]
    assert found[0] == 2 * 8 * 3 * 3
    assert found[1] == 2 * 8 * 3 * 3


def test_a_called_function_costs_what_it_does():
    layer = keras.layers.Dense(5)
    graph = traced(tf.function(layer, autograph=False), tf.ones([8, 3]))
    inside = by_type(graph)["PartitionedCall"]
    plain = flops(traced(layer, tf.ones([8, 3])))
    assert (inside[0], inside[1]) == plain
    assert inside[2] == 8 * 3 * 4


def test_a_weight_cast_to_half_precision_is_cast_again_and_not_kept():
    layer = keras.layers.Dense(64, dtype="mixed_float16", use_bias=False)
    stack = keras.Sequential([keras.layers.Dense(64), layer])
    costs = graph_costs(traced(stack, tf.ones([2, 64])))
    casts = [
        i
        for i, kind in enumerate(costs.wiring.types)
        if kind == "Cast" and costs.wiring.array((i, 0)).elements == 64 * 64
    ]
    assert len(casts) == 1
    assert costs.residual_bytes[casts[0]] == 0
    assert costs.backward[casts[0]].flops >= costs.forward[casts[0]].flops > 0


def test_trained_variables_are_required_and_counters_are_not():
    layers = keras.Sequential(
        [keras.layers.Dense(3), keras.layers.BatchNormalization(), keras.layers.Dropout(0.5)]
    )
    graph = traced(layers, tf.ones([8, 3]), training=True)
    placeholders = {id(v.placeholder): v.variable for v in graph.variables}
    required = [placeholders[id(t)] for t in trainable_placeholders(graph)]
    assert {id(v) for v in required} == {id(v) for v in layers.trainable_variables}


def test_flops_by_name_of_the_operation():
    graph = traced(keras.layers.Dense(5, name="dense"), tf.ones([8, 3]))
    found = graph_costs(graph).flops()
    (product,) = [name for name in found if name.endswith("MatMul")]
    assert found[product] == (240, 240)


# --- types that nothing is known of -----------------------------------------------------------


def test_a_type_without_a_formula_is_listed():
    graph = traced(lambda x: tf.raw_ops.Betainc(a=x, b=x, x=x), tf.ones([4, 3]))
    assert graph_costs(graph, required=()).defaulted == ("Betainc",)
    assert by_type(graph)["Betainc"][0] == 12


def test_a_type_inside_a_loop_is_listed_too():
    def call(x):
        return tf.while_loop(
            lambda i, _: i < 3, lambda i, x: (i + 1, tf.raw_ops.Betainc(a=x, b=x, x=x)), [0, x]
        )[1]

    assert graph_costs(traced(call, tf.ones([4, 3])), required=()).defaulted == ("Betainc",)


def _assert_nothing_defaulted(name):
    graph = zoo_graph(name)
    assert graph_costs(graph, required=()).defaulted == ()


@pytest.mark.parametrize("name", QUICK)
def test_every_operation_of_these_models_has_a_formula(name):
    _assert_nothing_defaulted(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [e.name for e in by_size() if e.name not in QUICK])
def test_every_operation_of_the_zoo_has_a_formula(name):
    _assert_nothing_defaulted(name)


# --- residuals --------------------------------------------------------------------------------


def size(tensor):
    return int(np.prod(tensor.shape.as_list())) * tensor.dtype.size


def memory(tensor):
    """The tensor whose memory a tensor shares."""
    while tensor.op.type in ALIASES and tensor.op.inputs:
        of = tensor.value_index if tensor.op.type == "IdentityN" else 0
        tensor = tensor.op.inputs[of]
    return tensor


def list_size(handle):
    for dtype in (tf.float32, tf.int32, tf.bool):
        try:
            stacked = tf.raw_ops.TensorListStack(
                input_handle=handle, element_shape=-1, element_dtype=dtype
            )
        except tf.errors.InvalidArgumentError:
            continue
        return stacked.numpy().nbytes
    raise AssertionError("a list of another type")


def true_residual_bytes(graph):
    """What the backward function of the whole model reads, but for weights and gradients."""
    plan = Plan("all", 1, {op.name: 0 for op in graph.operations if op not in graph.sources})
    program = Program(graph, plan, trainable_placeholders(graph))
    weights = {id(v.placeholder) for v in graph.variables}
    kept, listed = {}, 0
    for segment in program.segments:
        forward, backward = program.forward(segment), program.backward(segment, segment.outputs)
        if backward is None:
            continue
        read = [t for t in backward.feeds if id(t) not in weights]
        read = [t for t in read if not any(t is u for u in backward.gradient.upstream)]
        kept.update((id(memory(t)), memory(t)) for t in read if t.dtype != tf.variant)
        lists = [t for t in read if t.dtype == tf.variant]
        if lists:  # what a loop keeps lies in lists, whose size only a run tells
            feeds = [tf.cast(tf.ones(t.shape), t.dtype) for t in forward.feeds]
            made = zip(
                (*forward.outputs, *forward.residuals), forward.function(*feeds), strict=True
            )
            value = {id(t): v for t, v in made}
            listed += sum(list_size(value[id(t)]) for t in lists)
    return sum(map(size, kept.values())) + listed


class Mixed(keras.Model):
    """Branches, an addition, dropout, normalisation, a custom gradient."""

    def __init__(self):
        super().__init__(name="mixed")
        self.one = keras.layers.Dense(32, activation="silu")
        self.two = keras.layers.Dense(32, activation="gelu")
        self.norm = keras.layers.LayerNormalization()
        self.drop = keras.layers.Dropout(0.5)
        self.top = keras.layers.Dense(4, activation="softmax")

    def call(self, x, training=None):
        return self.top(self.drop(self.norm(self.one(x) + self.two(x)), training=training))


SMALL = {
    "mixed": (Mixed, tf.ones([8, 12])),
    "lstm": (
        lambda: keras.Sequential(
            [
                keras.layers.Embedding(50, 16),
                keras.layers.LSTM(8, return_sequences=True),
                keras.layers.LSTM(8),
            ]
        ),
        tf.ones([8, 12], tf.int32),
    ),
    "gru": (
        lambda: keras.layers.Bidirectional(keras.layers.GRU(8)),
        tf.ones([8, 12, 16]),
    ),
    "cnn": (
        lambda: keras.Sequential(
            [
                keras.layers.Conv2D(4, 3, padding="same", activation="relu"),
                keras.layers.BatchNormalization(),
                keras.layers.MaxPooling2D(),
                keras.layers.DepthwiseConv2D(3),
                keras.layers.GlobalAveragePooling2D(),
                keras.layers.Dense(3),
            ]
        ),
        tf.ones([4, 8, 8, 3]),
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_residual_bytes_are_within_three_tenths_of_the_true_ones(name):
    make, x = SMALL[name]
    model = make()
    model(x)
    graph = traced(model, x, training=True)
    estimated = int(graph_costs(graph).residual_bytes.sum())
    assert estimated == pytest.approx(true_residual_bytes(graph), rel=0.3)


@pytest.mark.parametrize("name", ["MobileNetV2", "GPT2Backbone", "T5Backbone"])
def test_residual_bytes_of_the_zoo_are_within_a_twentieth_of_the_true_ones(name):
    graph = zoo_graph(name)
    estimated = int(graph_costs(graph).residual_bytes.sum())
    assert estimated == pytest.approx(true_residual_bytes(graph), rel=0.05)


def test_views_of_one_tensor_are_kept_once():
    def call(x):
        y = tf.sigmoid(x)
        return tf.reshape(y, [-1]) * tf.reshape(y * 2.0, [-1])

    weight = tf.Variable(tf.ones([4, 3]))
    costs = graph_costs(traced(lambda x: call(x * weight), tf.ones([4, 3])))
    # The factor x, the result of the sigmoid (also as a view), and its double.
    assert costs.residual_bytes.sum() == 3 * 4 * 3 * 4
