"""Small models and data that several test files use."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

import opensmp as smp
from opensmp import _private
from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.trace import partition_tags
from opensmp.compiler.trace.trace import TracedGraph, trace

MANUAL = {"auto_partition": False, "default_partition": 0}
TWO_BY_TWO = {**MANUAL, "partitions": 2, "microbatches": 2}
TWO_BY_FOUR = {**MANUAL, "partitions": 2, "microbatches": 4}

STEP_OF_TWO = """
import keras
import tensorflow as tf

x = inputs = keras.Input((4,))
for part in (0, 1):
    with smp.partition(part):
        x = keras.layers.Dense(4, kernel_initializer="ones")(x)
model = smp.DistributedModel.from_keras(keras.Model(inputs, x))

@smp.step
def forward(x):
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(x, training=True))
    return tape.gradient(loss, model.trainable_variables), loss
"""
"""A model in two partitions and a step of it, for scripts that have called `smp.init`."""


class Net(smp.DistributedModel):
    """Two dense layers, the second one on the last of two partitions."""

    def __init__(self, units: int = 3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hidden = keras.layers.Dense(4, activation="tanh", name="hidden")
        self.top = keras.layers.Dense(units, name="top")

    def call(self, x: Any, training: Any = None) -> Any:
        with smp.partition(0):
            x = self.hidden(x)
        with smp.partition(1):
            return self.top(x)


class Scale(smp.DistributedModel):
    """Multiplies by one weight that starts at `factor`, on partition `partition`."""

    def __init__(self, factor: float = 3.0, partition: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.partition = partition
        self.factor = self.add_weight(
            shape=(), initializer=keras.initializers.Constant(factor), name="factor"
        )

    def call(self, x: Any, training: Any = None) -> Any:
        with smp.partition(self.partition):
            return x * self.factor


class Wrapped(smp.DistributedModel):
    """A model whose `call(x)` is any function, on partition `partition`."""

    def __init__(self, function: Any, partition: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.function = function
        self.partition = partition
        self.weight = self.add_weight(shape=(), initializer="ones", name="weight")

    def call(self, x: Any, training: Any = None) -> Any:
        with smp.partition(self.partition):
            return self.function(self, x)


def plain_net(units: int = 3) -> keras.Model:
    """The layers of `Net` in an ordinary Keras model."""
    return keras.Sequential(
        [
            keras.layers.Dense(4, activation="tanh", name="hidden"),
            keras.layers.Dense(units, name="top"),
        ]
    )


def batch(rows: int = 8, columns: int = 5, seed: int = 0) -> Any:
    """A float32 tensor of shape (rows, columns)."""
    rng = np.random.default_rng(seed)
    return tf.constant(rng.normal(size=(rows, columns)), tf.float32)


def device_index(tensor: Any) -> int:
    """The number of the logical device a tensor or variable lies on."""
    return int(tensor.device.rsplit(":", 1)[1])


def in_partition(index: int, function: Any, *args: Any) -> Any:
    """`function(*args)` with its operations marked for a partition, while a model is traced."""
    with partition_tags.tag(index):
        return function(*args)


def traced(function: Any, *args: Any, **kwargs: Any) -> TracedGraph:
    """The graph of one call of a function."""
    return trace(function, args, kwargs, name="model")


def planned(function: Any, *args: Any, partitions: int = 2) -> tuple[TracedGraph, Plan]:
    """The graph of one call of a function, and the plan that its marks make."""
    graph = traced(function, *args)
    marks = {op.name: _private.tag_of(op) or 0 for op in graph.operations}
    plan = {op.name: marks[op.name] for op in graph.operations if op not in graph.sources}
    return graph, Plan("model", partitions, plan)


def types(function: Any) -> list[str]:
    """Types of the operations of a concrete function."""
    return [op.type for op in function.graph.get_operations()]


def values_of(traced, x):
    """Values of inputs and variables by id of their placeholder."""
    values = {id(v.placeholder): tf.convert_to_tensor(v.variable) for v in traced.variables}
    return values | {id(traced.inputs[0]): x}


def run_forward(program, values):
    for segment in program.segments:
        forward = program.forward(segment)
        results = forward.kept(forward.function(*(values[id(t)] for t in forward.feeds)))
        made = (*forward.outputs, *forward.residuals)
        values.update({id(t): r for t, r in zip(made, results, strict=True)})
    return values


def run_backward(program, values, upstream):
    """Runs the backward passes in turn; returns the gradients by id, of inputs and variables.

    `values` are those of `run_forward`, `upstream` the gradients of the model's outputs by id.
    """
    found, upstream = {}, dict(upstream)
    for segment in reversed(program.segments):
        backward = program.backward(segment, segment.outputs)
        given = zip(backward.gradient.upstream, backward.gradient.outputs, strict=True)
        fed = values | {id(p): upstream[id(t)] for p, t in given}
        results = backward.function(*(fed[id(t)] for t in backward.feeds))
        for t, g in zip(backward.gradient.wrt, backward.gradient.pack(results), strict=True):
            found[id(t)] = upstream[id(t)] = g
    return found
