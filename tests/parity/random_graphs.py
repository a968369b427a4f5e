"""Random models: a graph of a few kinds of operations, each in a random partition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf
from hypothesis import strategies as st
from parity.bounds import Bound
from parity.case import Case, Parts, StepFunction, vectors
from parity.layout import Layout, Maker, with_policy

from opensmp.config.pipelines import PIPELINES

Tensor = Any
WIDTH, MOST = 4, 12
NUM_STAGES = 4
KINDS = (
    "dense",
    "shared",
    "frozen",
    "normalize",
    "dropout",
    "tanh",
    "stop",
    "add",
    "multiply",
    "concat",
    "split",
)


@dataclass(frozen=True)
class Node:
    """One operation of a random model.

    Attributes:
        kind: One of KINDS.
        inputs: Two numbers that choose among the values made before; most kinds take one.
        stage: The stage it lies in, None for none.
    """

    kind: str
    inputs: tuple[int, int]
    stage: int | None


@dataclass(frozen=True)
class Graph:
    """A random model and what is done with it.

    Attributes:
        nodes: Its operations in order.
        outputs: Numbers that choose the outputs among all values.
        used: Numbers that choose, among the outputs, those that the loss depends on.
        watches_input: Whether the gradient of the input is taken as well.
    """

    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]
    used: tuple[int, ...]
    watches_input: bool


def graphs() -> st.SearchStrategy[Graph]:
    """Any small random model."""
    number = st.integers(0, 11)
    stage = st.one_of(st.none(), st.integers(0, NUM_STAGES - 1))
    node = st.builds(Node, st.sampled_from(KINDS), st.tuples(number, number), stage)
    return st.builds(
        Graph,
        st.lists(node, min_size=1, max_size=10).map(tuple),
        st.lists(number, min_size=1, max_size=3).map(tuple),
        st.lists(number, min_size=1, max_size=2).map(tuple),
        st.booleans(),
    )


def layouts() -> st.SearchStrategy[Layout]:
    """Any small layout."""
    return st.builds(
        Layout,
        st.integers(1, 4),
        st.integers(1, 4),
        st.sampled_from(sorted(PIPELINES)),
        st.sampled_from(["blocks", "cyclic", "v", "auto"]),
    )


def case_of(graph: Graph) -> Case:
    """The comparison for a random model, in double precision.

    There a mistake and a sum in another order cannot be confused.
    """
    return Case(
        "random graph",
        lambda make: with_policy("float64", lambda make: _model(graph, make), make),
        vectors(WIDTH, WIDTH, "float64"),
        lambda parts: _step(graph, parts),
        num_stages=NUM_STAGES,
        bound=Bound(1e-12, "values used in several partitions"),
        optimizer=lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    )


def _model(graph: Graph, make: Maker) -> Any:
    class Random(make.Model):
        def __init__(self) -> None:
            super().__init__()
            self.shared = keras.layers.Dense(WIDTH, activation="tanh")
            self.own = [_layer(node) for node in graph.nodes]

        def call(self, x: Tensor, training: bool | None = None) -> list[Tensor]:
            values = [x]
            for node, layer in zip(graph.nodes, self.own, strict=True):
                first, second = (values[i % len(values)] for i in node.inputs)
                if node.stage is None:
                    values += self.make(node.kind, layer, first, second, training)
                else:
                    with make.partition(node.stage):
                        values += self.make(node.kind, layer, first, second, training)
            return [tf.identity(values[-1 - i % len(values)]) for i in graph.outputs]

        def make(
            self, kind: str, layer: Any, first: Tensor, second: Tensor, training: bool | None
        ) -> list[Tensor]:
            if kind == "shared":
                return [self.shared(_fit(first, WIDTH))]
            if layer is not None:
                options = {"training": training} if kind in ("normalize", "dropout") else {}
                return [layer(first, **options)]
            if kind == "tanh":
                return [tf.tanh(first)]
            if kind == "stop":
                return [tf.stop_gradient(first)]
            if kind == "concat":
                return [tf.concat([first, second], -1)[:, :MOST]]
            if kind == "split":
                return tf.split(_fit(first, WIDTH), 2, axis=-1)
            second = _fit(second, first.shape[-1])
            return [first + second if kind == "add" else first * tf.sigmoid(second)]

    return Random()


def _layer(node: Node) -> Any:
    if node.kind == "dense":
        return keras.layers.Dense(WIDTH)
    if node.kind == "frozen":
        return keras.layers.Dense(WIDTH, trainable=False)
    if node.kind == "normalize":
        return keras.layers.BatchNormalization()
    if node.kind == "dropout":
        return keras.layers.Dropout(0.25)
    return None


def _fit(x: Tensor, width: int) -> Tensor:
    """The tensor with another width: columns dropped, or zeros added."""
    missing = max(0, width - x.shape[-1])
    return tf.pad(x, [[0, 0], [0, missing]])[:, :width] if missing else x[:, :width]


def _step(graph: Graph, parts: Parts) -> StepFunction:
    model = parts["model"]

    def step(x: Tensor, y: Tensor) -> dict[str, Any]:
        with tf.GradientTape(persistent=True) as tape:
            if graph.watches_input:
                tape.watch(x)
            outputs = model(x, training=True)
            used = [outputs[i % len(outputs)] for i in graph.used]
            errors = [tf.math.squared_difference(o, _fit(y, o.shape[-1])) for o in used]
            loss = tf.add_n([tf.reduce_mean(error) for error in errors])
        results = {"loss": loss, "outputs": outputs}
        if graph.watches_input:
            results["of input"] = tape.gradient(loss, x)
        gradients = tape.gradient(loss, model.trainable_variables)
        return {**results, "gradients": {"model": gradients}}

    return step
