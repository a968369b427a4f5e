"""How long it takes until a step can run: trace, plan, lower, schedule, emit.

    python benchmarks/planning_speed.py            # both tables, some minutes
    python benchmarks/planning_speed.py --quick    # small sizes, under a minute

The first table is BERT-large (Devlin et al., 2019: 24 layers of width 1024, 16 heads, 512
tokens) on 8 partitions with 16 microbatches: an `smp.step` with forward and backward pass is
traced, never run, and its time divided among the arrows of the design. Nothing is allocated
but the variables, which a step must have; that is a row of its own. "Rehearsal" is the user's
function on the plain model, which gives the variables their places before anything counts.

The second table is for generated graphs of many operations in branches that meet again, with
variables and without layers: the time to make a plan of them, in all and per operation.

Both print wall time and processor time: on a busy machine the first says little.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import keras
import tensorflow as tf

import opensmp as smp
from opensmp.api.step import step
from opensmp.compiler.lowering.program import Program
from opensmp.compiler.plan.coarsening.coarsen import coarsen
from opensmp.compiler.plan.methods.auto import plan_units
from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.trace.trace import TracedGraph, trace
from opensmp.execution import partitioning
from opensmp.execution.emission import pipeline

LIMIT = 60.0
ARROWS = ("build", "trace", "plan", "variables", "lower", "schedule", "rehearsal", "emit")
SIZES = (1000, 10_000, 100_000)
COUNTED = ("trace", "plan", "lower", "schedule", "rehearsal", "emit")


class Times:
    """Wall and processor seconds by name; what is timed inside counts for the inner name."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        self._stack: list[str] = []
        self._since = (0.0, 0.0)

    @contextlib.contextmanager
    def named(self, name: str) -> Iterator[None]:
        self._switch()
        self._stack.append(name)
        try:
            yield
        finally:
            self._switch()
            self._stack.pop()

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.named(name):
                return function(*args, **kwargs)

        return timed

    def _switch(self) -> None:
        now = time.perf_counter(), time.process_time()
        if self._stack:
            name = self._stack[-1]
            self.wall[name] = self.wall.get(name, 0.0) + now[0] - self._since[0]
            self.cpu[name] = self.cpu.get(name, 0.0) + now[1] - self._since[1]
        self._since = now

    def rows(self) -> list[str]:
        return [f"| {n} | {self.wall.get(n, 0):.1f} | {self.cpu.get(n, 0):.1f} |" for n in ARROWS]


def bert(layers: int, width: int, heads: int, length: int, vocabulary: int) -> keras.Model:
    """BERT with a classifier on top; its variables wait for their memory."""

    def block(x: Any) -> Any:
        attention = keras.layers.MultiHeadAttention(heads, width // heads, dropout=0.1)
        h = keras.layers.Dropout(0.1)(attention(x, x))
        x = keras.layers.LayerNormalization(epsilon=1e-12)(keras.layers.Add()([x, h]))
        h = keras.layers.Dense(4 * width, activation="gelu")(x)
        h = keras.layers.Dropout(0.1)(keras.layers.Dense(width)(h))
        return keras.layers.LayerNormalization(epsilon=1e-12)(keras.layers.Add()([x, h]))

    with keras.StatelessScope(initialize_variables=False):
        tokens = keras.Input((length,), dtype="int32", name="tokens")
        segments = keras.Input((length,), dtype="int32", name="segments")
        places = keras.Input((length,), dtype="int32", name="places")
        x = keras.layers.Add()(
            [
                keras.layers.Embedding(vocabulary, width)(tokens),
                keras.layers.Embedding(2, width)(segments),
                keras.layers.Embedding(length, width)(places),
            ]
        )
        x = keras.layers.Dropout(0.1)(keras.layers.LayerNormalization(epsilon=1e-12)(x))
        for _ in range(layers):
            x = block(x)
        pooled = keras.layers.Dense(width, activation="tanh")(x[:, 0])
        return keras.Model([tokens, segments, places], keras.layers.Dense(2)(pooled))


def traced_step(
    layers: int, width: int, length: int, partitions: int, microbatches: int
) -> tuple[Times, Any, keras.Model]:
    """Traces the step of a BERT, timed; returns the times, the step and the model."""
    smp.init({"partitions": partitions, "microbatches": microbatches})
    times = Times()
    with times.named("build"):
        plain = bert(layers, width, width // 64, length, 30522)
        model = smp.DistributedModel.from_keras(plain)
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @smp.step
    def forward_backward(inputs: Any, labels: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = loss_fn(labels, model(inputs, training=True))
        return tape.gradient(loss, model.trainable_variables), loss

    tokens = tf.TensorSpec([microbatches, length], tf.int32)
    labels = tf.TensorSpec([microbatches], tf.int32)
    with contextlib.ExitStack() as stack:
        for owner, attribute, name in (
            (partitioning, "trace", "trace"),
            (partitioning.Partitioning, "_plan", "plan"),
            (partitioning, "place", "variables"),
            (Program, "__init__", "lower"),
            (Program, "backward", "lower"),
            (Program, "recompute", "lower"),
            (pipeline, "task_graph", "schedule"),
            (pipeline, "build", "schedule"),
            (pipeline.Pipeline, "run", "emit"),
        ):
            timed = times.around(name, getattr(owner, attribute))
            stack.enter_context(mock.patch.object(owner, attribute, timed))
        warming_up = step.warming_up

        @contextlib.contextmanager
        def rehearsing_timed(*args: Any) -> Iterator[Any]:
            with times.named("rehearsal"), warming_up(*args) as traces:
                yield traces

        stack.enter_context(mock.patch.object(step, "warming_up", rehearsing_timed))
        with times.named("emit"):
            forward_backward.get_concrete_function([tokens, tokens, tokens], labels)
    return times, forward_backward, model


def generated(num_operations: int) -> TracedGraph:
    """A graph of about so many operations, in four branches that meet again and again."""
    draw = random.Random(0)
    with keras.StatelessScope(initialize_variables=False):
        # Each product has a weight of its own, so that there is something to distribute.
        weights = [
            keras.Variable(keras.initializers.Zeros(), (64, 64))
            for _ in range(num_operations // 50 + 1)
        ]

    def call(x: Any) -> Any:
        live = [x] * 4
        for index in range(num_operations):
            a, b = draw.choice(live), draw.choice(live)
            if index % 50 == 0:
                made = tf.raw_ops.MatMul(a=a, b=weights[index // 50].value)
            elif index % 3 == 0:
                made = tf.raw_ops.AddV2(x=a, y=b)
            else:
                made = tf.raw_ops.Tanh(x=a)
            live[draw.randrange(4)] = made
        return tf.raw_ops.AddN(inputs=live)

    return trace(call, [tf.zeros([32, 64])], {}, name=f"generated_{num_operations}")


def show_one(count: int) -> float:
    """Plans a generated graph, prints its row, and returns the wall seconds."""
    traced, settings = generated(count), PlanSettings(microbatches=16)
    times = Times()
    with times.named("coarsen"):
        graph = coarsen(traced, settings.machine)
    with times.named("cut"):
        plan_units(traced, graph, 8, settings)
    wall, cpu = sum(times.wall.values()), sum(times.cpu.values())
    number = len(traced.operations)
    print(
        f"| {number:,} | {len(graph):,} | {times.cpu['coarsen']:.2f} | {times.cpu['cut']:.2f} "
        f"| {cpu:.2f} | {wall:.2f} | {1e6 * times.cpu['coarsen'] / number:.0f} "
        f"| {1e6 * cpu / number:.0f} |",
        flush=True,
    )
    return wall


def show_bert(quick: bool) -> bool:
    layers, width, length, partitions, microbatches = (
        (4, 128, 64, 2, 4) if quick else (24, 1024, 512, 8, 16)
    )
    times, forward_backward, model = traced_step(layers, width, length, partitions, microbatches)
    actions = sum(map(len, forward_backward.schedule.orders))
    parameters = sum(p.parameter_bytes for p in model.plan.rows) / 4e6
    print(
        f"BERT, {layers} layers of {width}, {length} tokens, {partitions} partitions, "
        f"{microbatches} microbatches: {parameters:.0f} M parameters, {actions} calls\n"
    )
    print("| arrow | wall, s | processor, s |\n| --- | --: | --: |")
    print(*times.rows(), sep="\n")
    wall = sum(times.wall.get(name, 0) for name in COUNTED)
    cpu = sum(times.cpu.get(name, 0) for name in COUNTED)
    print(f"| **all but build and variables** | **{wall:.1f}** | **{cpu:.1f}** |\n", flush=True)
    return wall < LIMIT


def show_generated(quick: bool) -> bool:
    print("Seconds of the processor, for 8 partitions and 16 microbatches:\n")
    print(
        "| operations | units | coarsen | cut | plan | plan, wall | coarsen, us per operation "
        "| plan, us per operation |\n| --: | --: | --: | --: | --: | --: | --: | --: |"
    )
    slowest = max(show_one(count) for count in ((300, 2000) if quick else SIZES))
    return slowest < LIMIT


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, no limit")
    parser.add_argument("--only", choices=["bert", "generated"], help="one of the tables")
    arguments = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, TensorFlow {tf.__version__}, Keras {keras.__version__}\n"
    )
    fine = arguments.only == "generated" or show_bert(arguments.quick)
    if arguments.only != "bert":
        fine &= show_generated(arguments.quick)
    return 0 if fine or arguments.quick else 1


if __name__ == "__main__":
    sys.exit(main())
