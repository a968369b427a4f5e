"""What forward passes keep and backward passes run again, seen in lowered models."""

from __future__ import annotations

from typing import Any

import keras
import pytest
import tensorflow as tf
from small import in_partition, planned

from opensmp.compiler.lowering.program import Program
from opensmp.compiler.recomputation.census import INPUT, kept_bytes
from opensmp.compiler.recomputation.policy import Policy

ROWS, WIDTH = 4, 160
X = tf.random.stateless_normal([ROWS, WIDTH], [1, 2])
SEQUENCES = tf.random.stateless_normal([2, 128, 64], [1, 2])


def lowered(model: Any, level: Any, x: Any = X, **options: Any) -> Program:
    traced, plan = planned(model, x, partitions=1)
    policy = Policy(level) if isinstance(level, str) else level
    required = [v.placeholder for v in traced.variables if v.variable.trainable]
    return Program(traced, plan, required, recompute=policy, **options)


def types(function: Any) -> list[str]:
    """Types of the operations of a function and of those that it calls."""
    graph = function.graph.as_graph_def()
    parts = (graph.node, *(f.node_def for f in graph.library.function))
    return [node.op for part in parts for node in part]


def run_in(backward: Any) -> list[str]:
    """Types of the operations that run in a backward pass, or again before it."""
    again = backward.recompute
    return types(backward.function) + (types(again.function) if again is not None else [])


def built(*layers: keras.layers.Layer, x: Any = X) -> Any:
    def model(x: Any) -> Any:
        for layer in layers:
            x = layer(x, training=True) if hasattr(layer, "seed_generator") else layer(x)
        return x

    model(x)
    return model


def dense_layers(activation: str = "gelu") -> Any:
    return built(*(keras.layers.Dense(WIDTH, activation, name=f"d{i}") for i in range(4)))


def backward_of(program: Program) -> Any:
    (segment,) = program.segments
    return program.backward(segment, segment.outputs)


def test_none_is_what_was_kept_before():
    model = dense_layers()
    assert kept_bytes(lowered(model, "none")) == kept_bytes(lowered(model, None))


def test_full_keeps_the_inputs_only_and_runs_all_but_the_output_again():
    program = lowered(dense_layers(), "full")
    assert kept_bytes(program) == {INPUT: ROWS * WIDTH * 4}
    forward_products = run_in(backward_of(program)).count("MatMul") - 7
    assert forward_products == 4  # 4 of weights, 3 of inputs, and the forward pass


def test_selective_keeps_products_and_runs_activations_again():
    none, chosen = (lowered(dense_layers(), level) for level in ("none", "selective"))
    kept = kept_bytes(chosen)
    tensor = ROWS * WIDTH * 4
    assert kept[INPUT] == tensor
    assert sum(kept.values()) == 5 * tensor  # the input, and one of each layer
    assert sum(kept_bytes(none).values()) >= 9 * tensor
    assert run_in(backward_of(chosen)).count("MatMul") == 7
    assert "Erfc" in run_in(backward_of(chosen))


def test_levels_of_layers_hold_for_these_layers_alone():
    model = dense_layers("tanh")
    policy = Policy("none", (), (("d1", "full"), ("d2", "full")))
    program = lowered(model, policy)
    kept = kept_bytes(program)
    # The inputs of d0 and d1, and the results of d3, whose own level is none; those of d1 and d2
    # are computed again.
    assert sum(kept.values()) < sum(kept_bytes(lowered(model, "none")).values())
    assert run_in(backward_of(program)).count("MatMul") == 7 + 2


def test_scores_of_attention_are_run_again_selectively():
    layer = keras.layers.MultiHeadAttention(4, 16, dropout=0.1, seed=1)
    layer(SEQUENCES, SEQUENCES)

    def model(x: Any) -> Any:
        return layer(x, x, training=True)

    none, chosen = (lowered(model, level, SEQUENCES) for level in ("none", "selective"))
    scores = 2 * 4 * 128 * 128 * 4
    assert sum(kept_bytes(none).values()) > 2 * scores
    assert sum(kept_bytes(chosen).values()) < scores
    assert "StatelessRandomUniformV2" in run_in(backward_of(chosen))


@pytest.mark.parametrize("level", ["selective", "full"])
def test_random_numbers_that_no_seed_determines_are_kept(level):
    dense = keras.layers.Dense(WIDTH)

    def model(x: Any) -> Any:
        x = tf.tanh(dense(x)) * tf.random.uniform([ROWS, WIDTH])
        return tf.tanh(x)

    model(X)
    program = lowered(model, level)
    assert "RandomUniform" in kept_bytes(program) or "Mul" in kept_bytes(program)
    assert "RandomUniform" not in run_in(backward_of(program))


def test_tables_are_not_read_twice():
    table = tf.lookup.StaticHashTable(
        tf.lookup.KeyValueTensorInitializer(tf.constant([0, 1], tf.int64), tf.constant([1.5, 2.0])),
        default_value=0.5,
    )
    dense = keras.layers.Dense(WIDTH)

    def model(x: Any) -> Any:
        factor = table.lookup(tf.cast(tf.round(x), tf.int64))
        return tf.tanh(dense(tf.tanh(x * factor)))

    model(X)
    backward = backward_of(lowered(model, "full"))
    assert not any("Lookup" in each for each in run_in(backward))


def test_max_pooling_stays_beside_its_gradient():
    x = tf.random.stateless_normal([2, 8, 8, 3], [1, 2])
    model = built(
        keras.layers.Conv2D(4, 3, activation="relu"),
        keras.layers.MaxPooling2D(),
        keras.layers.Conv2D(2, 2),
        x=x,
    )
    for level in ("selective", "full"):
        backward = run_in(backward_of(lowered(model, level, x)))
        assert backward.count("MaxPool") == backward.count("MaxPoolGrad") == 1


@pytest.mark.parametrize("wrap", ["recompute_grad", "RematScope"])
def test_what_the_model_recomputes_itself_is_not_kept(wrap):
    layers = [keras.layers.Dense(WIDTH, "gelu") for _ in range(3)]
    plain = built(*layers)

    def wrapped(x: Any) -> Any:
        return tf.recompute_grad(plain)(x)

    scoped = plain
    if wrap == "RematScope":
        with keras.RematScope("full"):
            again = [keras.layers.Dense(WIDTH, "gelu") for _ in range(3)]
            scoped = built(*again)
    model = wrapped if wrap == "recompute_grad" else scoped
    kept = [sum(kept_bytes(lowered(each, "none")).values()) for each in (plain, model)]
    assert kept[1] < kept[0] / 2
    tensor = ROWS * WIDTH * 4
    assert kept[1] <= (1 if wrap == "recompute_grad" else 3) * tensor


def test_halves_of_a_backward_pass_share_what_is_recomputed():
    layers = [keras.layers.Dense(WIDTH, "gelu") for _ in range(3)]
    model = built(*layers)

    def two(x: Any) -> Any:
        return in_partition(1, model, in_partition(0, tf.tanh, x))

    traced, plan = planned(two, X)
    leaves = [*traced.inputs, *(v.placeholder for v in traced.variables)]
    program = Program(traced, plan, leaves, split_backward=True, recompute=Policy("full"))
    segment = program.segments[1]
    first = program.backward(segment, segment.outputs)
    assert first.weights is not None
    assert run_in(first).count("Erfc") == 3
    assert "Erfc" not in types(first.weights.function)


def test_checked_activations_are_results_when_they_are_computed_again():
    """TensorFlow fuses an operation into its only reader: the check is one in forward passes."""
    layers = [each for _ in range(3) for each in (keras.layers.Dense(WIDTH), keras.layers.ReLU())]
    program = lowered(built(*layers), "full", checks_finite=True)
    (segment,) = program.segments
    again = backward_of(program).recompute
    fetched = {t.op for t in again.fetches}
    names = {op.name for op in again.function.graph.get_operations()}
    checked = [each.tensor.op for each in program.forward(segment).activations]
    computed = [op for op in checked if op.name in names and op.type != "Placeholder"]
    assert "BiasAdd" in {op.type for op in computed}
    assert all(op in fetched for op in computed)
