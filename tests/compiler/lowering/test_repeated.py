"""Operations whose gradients want them beside themselves in the backward function."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from opensmp.compiler.lowering.program import Program
from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.trace.trace import trace

IMAGES = tf.constant(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), tf.float32)


def convolution(before: bool, after: bool) -> keras.Model:
    keras.utils.set_random_seed(1)
    x = images = keras.Input((8, 8, 3))
    if before:
        x = keras.layers.Conv2D(4, 3, activation="relu")(x)
    x = keras.layers.MaxPooling2D()(x)
    if after:
        x = keras.layers.Conv2D(2, 2)(x)
    return keras.Model(images, x)


def lowered(model: keras.Model) -> Program:
    """The model in one partition, with gradients for its variables."""
    traced = trace(model, (IMAGES,), {}, name="model")
    plan = Plan("model", 1, {op.name: 0 for op in traced.operations})
    return Program(traced, plan, [v.placeholder for v in traced.variables])


def types(function: Any) -> list[str]:
    return [op.type for op in function.graph.get_operations()]


@pytest.mark.parametrize("after", [True, False], ids=["inner", "output"])
def test_max_pooling_is_run_again_beside_its_gradient(after):
    program = lowered(convolution(before=True, after=after))
    (segment,) = program.segments
    backward = program.backward(segment, segment.outputs)
    assert types(backward.function).count("MaxPoolGrad") == 1
    assert types(backward.function).count("MaxPool") == 1
    kept = [t.op.type for t in (*program.forward(segment).residuals, *backward.feeds)]
    assert "MaxPool" not in kept


def test_max_pooling_without_a_gradient_is_kept():
    program = lowered(convolution(before=False, after=True))
    (segment,) = program.segments
    backward = program.backward(segment, segment.outputs)
    assert "MaxPool" not in types(backward.function)
    assert "MaxPool" in [t.op.type for t in program.forward(segment).residuals]
