"""How well two stages overlap on two cores: the speed-up of a pipelined step over one thread.

    python benchmarks/overlap.py
    python benchmarks/overlap.py --trace out/timelines

The same training step (forward and backward passes of M microbatches, mean of the gradients,
SGD) in two processes, because TensorFlow's thread pools belong to the process:

- one thread: plain Keras in one tf.function, microbatch after microbatch;
- pipeline: smp.step, two partitions cut by cost, threads as `smp.init` sets them.

The two take turns, a few steps at a time, and wait for each other. A round gives one ratio of
their median steps; the speed-up is the median of the ratios. With equal stages it is at most
P * M / (M + P - 1) by the bubble.

Prediction, written before the first measurement: 90 % of the bound or more for M of 4 and
above. The bound assumes that a stage uses one core; where TensorFlow runs two operations of
one stage at the same time in what would be a bubble, the speed-up can be above the bound.
What is lost goes to memory bandwidth, which two cores share, and to stages of unequal work.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import models
import opensmp as smp

PARTITIONS = 2
WARM_UP = 3
STEPS_PER_TURN = 5  # threads that slept need a step or two until they are spread over the cores
LEARNING_RATE = 1e-3

WORKLOADS: dict[str, Callable[[], models.Workload]] = {
    "mlp": lambda: models.mlp(16, 1024, 256),
    "transformer": lambda: models.transformer(8, 256, 128, 2000, 32),
    "quick": lambda: models.mlp(4, 64, 16),
}


def bound(microbatches: int) -> float:
    """The most that the bubble leaves of PARTITIONS."""
    return PARTITIONS * microbatches / (microbatches + PARTITIONS - 1)


# ------------------------------------------------------------- the processes that are measured


def plain_step(workload: models.Workload, microbatches: int) -> Callable[..., Any]:
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    keras.utils.set_random_seed(0)
    model, loss_fn = workload.build(), models.loss_function()
    optimizer = keras.optimizers.SGD(LEARNING_RATE)

    @tf.function
    def train_step(inputs, labels):
        losses, gradients = [], []
        parts = zip(tf.split(inputs, microbatches), tf.split(labels, microbatches), strict=True)
        for x, y in parts:
            with tf.GradientTape() as tape:
                losses.append(loss_fn(y, model(x, training=True)))
            gradients.append(tape.gradient(losses[-1], model.trainable_variables))
        means = [mean(parts) for parts in zip(*gradients, strict=True)]
        optimizer.apply_gradients(zip(means, model.trainable_variables, strict=True))
        return tf.add_n(losses) / microbatches

    return train_step


def mean(gradients: tuple[Any, ...]) -> Any:
    if not isinstance(gradients[0], tf.IndexedSlices):
        return sum(gradients[1:], gradients[0]) / len(gradients)
    values = tf.concat([gradient.values for gradient in gradients], 0) / len(gradients)
    indices = tf.concat([gradient.indices for gradient in gradients], 0)
    return tf.IndexedSlices(values, indices, gradients[0].dense_shape)


def pipelined_step(
    workload: models.Workload,
    microbatches: int,
    pipeline: str = "interleaved",
    pieces: int = 1,
    partitions: int = PARTITIONS,
) -> Callable[..., Any]:
    smp.init(
        {
            "partitions": partitions,
            "microbatches": microbatches,
            "pipeline": pipeline,
            "optimize": "speed",
            "pieces_per_partition": pieces,
            "devices": "cpu",
        }
    )
    keras.utils.set_random_seed(0)
    model = smp.DistributedModel.from_keras(workload.build())
    # All at once, as TensorFlow does it in the plain step.
    return models.split_step(model, keras.optimizers.SGD(LEARNING_RATE), "add_n")


ROLES = {"one thread": plain_step, "pipeline": pipelined_step}


def serve(role: str, workload: models.Workload, microbatches: int) -> None:
    """Runs what the lines of standard input ask for; answers with JSON, a line each."""
    train_step = ROLES[role](workload, microbatches)
    inputs, labels = tf.constant(workload.inputs), tf.constant(workload.labels)
    for command, *arguments in map(json.loads, sys.stdin):
        if command == "steps":
            times = []
            for _ in range(arguments[0]):
                start = time.perf_counter()
                loss = float(train_step(inputs, labels))
                times.append(time.perf_counter() - start)
            answer = {"seconds": statistics.median(times), "loss": loss}
        else:
            with smp.record_timeline() as timeline:
                for _ in range(WARM_UP):
                    train_step(inputs, labels)
            if arguments[0] is not None:
                timeline.to_chrome_trace(arguments[0])
            answer = {"timeline": str(timeline)}
        print(json.dumps(answer), flush=True)


# ----------------------------------------------------------------------- the one that measures


class Process:
    """A process that runs steps when asked."""

    def __init__(self, role: str, workload: str, microbatches: int) -> None:
        arguments = ["--serve", role, "--workloads", workload, "--microbatches", str(microbatches)]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, *command: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"A measured process ended early, with {self.process.wait()}.")
        return json.loads(answer)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.communicate()


def measure(workload: str, microbatches: int, rounds: int, trace: Path | None) -> str:
    """Measures one row of the table; gives a drawn timeline."""
    with (
        Process("one thread", workload, microbatches) as single,
        Process("pipeline", workload, microbatches) as pipeline,
    ):
        losses = [process.ask("steps", WARM_UP)["loss"] for process in (single, pipeline)]
        np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
        singles, pipelines = [], []
        for _ in range(rounds):
            singles.append(single.ask("steps", STEPS_PER_TURN)["seconds"])
            pipelines.append(pipeline.ask("steps", STEPS_PER_TURN)["seconds"])
        timeline = pipeline.ask("timeline", None if trace is None else str(trace))["timeline"]
    ratios = [s / p for s, p in zip(singles, pipelines, strict=True)]
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    limit = bound(microbatches)
    print(
        f"| {microbatches} | {1e3 * statistics.median(singles):.0f} ms | "
        f"{1e3 * statistics.median(pipelines):.0f} ms | {middle:.2f} ({low:.2f} to {high:.2f}) | "
        f"{limit:.2f} | {100 * middle / limit:.0f} % |",
        flush=True,
    )
    return timeline


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, help="which models")
    parser.add_argument("--microbatches", nargs="+", type=int, help="which M")
    parser.add_argument("--rounds", type=int, default=11, help="turns of each process")
    parser.add_argument("--trace", type=Path, help="folder for Chrome traces, one a row")
    parser.add_argument("--quick", action="store_true", help="a small model, few steps")
    parser.add_argument("--serve", choices=ROLES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = arguments.workloads or (["quick"] if arguments.quick else ["mlp", "transformer"])
    counts = arguments.microbatches or ([4] if arguments.quick else [2, 4, 8, 16])
    rounds = 3 if arguments.quick else arguments.rounds
    if arguments.serve:
        serve(arguments.serve, WORKLOADS[names[0]](), counts[0])
        return 0
    if arguments.trace is not None:
        arguments.trace.mkdir(parents=True, exist_ok=True)
    print(
        f"{os.cpu_count()} cores, Python {platform.python_version()}, TensorFlow "
        f"{tf.__version__}, Keras {keras.__version__}, {rounds} rounds "
        f"of {STEPS_PER_TURN} steps"
    )
    for name in names:
        print(f"\n{WORKLOADS[name]().name}, {PARTITIONS} partitions\n")
        print("| M | one thread | pipeline | speed-up | bound | of the bound |")
        print("| --- | --- | --- | --- | --- | --- |", flush=True)
        timelines = {}
        for count in counts:
            trace = None
            if arguments.trace is not None:
                trace = arguments.trace.resolve() / f"{name}-{count}.json"
            timelines[count] = measure(name, count, rounds, trace)
        shown = 4 if 4 in timelines else counts[0]
        print(f"\nA step of {shown} microbatches:\n\n{timelines[shown]}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
