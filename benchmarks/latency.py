"""What the latency of a network costs a step: round trips that are waited for.

    python benchmarks/latency.py

Two ranks on two machines, which are network namespaces of this one, train a model of two
partitions. The network between them can be made longer while they run: in turns a few steps with
hardly any delay, and a few with a round trip of `--round-trip` milliseconds. A row gives the
medians of both, and their difference in round trips. If nothing hid the latency, a step of M
microbatches would wait for about M of them; a step cannot wait for less than one, because the
first gradient is on its way that long.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

STEPS = 4
SECONDS = 240.0


# ------------------------------------------------------------- the processes that are measured


def rank(row: dict[str, Any], delay_file: str, round_trip: float, rounds: int) -> None:
    """Trains in turns with and without a delay; rank 0 prints the medians in milliseconds."""
    import keras
    import numpy as np
    import tensorflow as tf

    import opensmp as smp

    smp.init({"partitions": 2, "auto_partition": True, **row["config"]})
    keras.utils.set_random_seed(7)
    width, rows = row["width"], row["rows"] * row["config"]["microbatches"]
    inputs = hidden = keras.Input((width,))
    for _ in range(row["layers"]):
        hidden = keras.layers.Dense(width, activation="tanh")(hidden)
    model = smp.DistributedModel.from_keras(keras.Model(inputs, keras.layers.Dense(4)(hidden)))
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.SGD(0.01)

    @smp.step
    def forward_backward(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = loss_of(y, model(x, training=True))
        return tape.gradient(loss, model.trainable_variables), loss

    @tf.function
    def train(x: Any, y: Any) -> Any:
        gradients, loss = forward_backward(x, y)
        optimizer.apply_gradients(
            zip([g.accumulate() for g in gradients], model.trainable_variables, strict=True)
        )
        return loss.reduce_mean()

    generator = np.random.default_rng(1)
    x = tf.constant(generator.normal(size=(rows, width)), tf.float32)
    y = tf.constant(generator.integers(0, 4, rows))
    for _ in range(3):
        loss = train(x, y)
    times: dict[float, list[float]] = {0.0: [], round_trip: []}
    for _ in range(rounds):
        for delay, found in times.items():
            smp.barrier()
            if smp.rank() == 0:
                with open(delay_file, "r+b") as file:  # the link has mapped it
                    file.write(struct.pack("d", delay / 2))
            smp.barrier()
            for _ in range(STEPS):
                began = time.perf_counter()
                loss = float(train(x, y))
                found.append(1e3 * (time.perf_counter() - began))
    if smp.rank() == 0:
        result = {str(delay): statistics.median(found) for delay, found in times.items()}
        print("RESULT", json.dumps({"medians": result, "loss": loss}), flush=True)


# -------------------------------------------------------------------------------- the judgement


def measure(row: dict[str, Any], round_trip: float, rounds: int) -> tuple[float, float]:
    """Medians of a step without and with the delay, in milliseconds."""
    from machines import Machines
    from processes import environ_of_tests

    with Machines(2, delay_seconds=0.0) as machines:
        given = json.dumps([row, str(machines.delay_file), round_trip, rounds])
        processes = []
        for number in range(2):
            environ = environ_of_tests(
                {"RANK": number, "WORLD_SIZE": 2, "MASTER_ADDR": machines.names[0],
                 "MASTER_PORT": 29571, "OPENSMP_RUN_TOKEN": "x"}
            )  # fmt: skip
            command = [sys.executable, __file__, "--rank", given]
            processes.append(machines.start(number, command, environ))
        try:
            output, _ = processes[0].communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            output = ""
        line = next((e for e in output.splitlines() if e.startswith("RESULT ")), None)
        if line is None:
            raise SystemExit(f"the ranks of {row} gave no result:\n{output}")
        medians = json.loads(line.removeprefix("RESULT "))["medians"]
    return medians["0.0"], medians[str(round_trip)]


def rows_of(pipelines: Sequence[str], microbatches: Sequence[int], active: int) -> Any:
    for pipeline in pipelines:
        for count in microbatches:
            config: dict[str, Any] = {"pipeline": pipeline, "microbatches": count}
            if active:
                config["active_microbatches"] = active
            yield {"config": config, "width": 256, "layers": 8, "rows": 32}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--round-trip", type=float, default=10.0, help="milliseconds")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--quick", action="store_true", help="one row, few rounds")
    parser.add_argument("--pipelines", default="simple,interleaved,zero_bubble")
    parser.add_argument("--microbatches", default="4,32")
    parser.add_argument("--active", type=int, default=0, help="active_microbatches")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        rank(*json.loads(arguments.rank))
        return 0
    pipelines = arguments.pipelines.split(",")
    counts = [int(text) for text in arguments.microbatches.split(",")]
    rounds = arguments.rounds
    if arguments.quick:
        pipelines, counts, rounds = pipelines[:1], counts[:1], 2
    print("pipeline       M   near ms   far ms   round trips waited for")
    for row in rows_of(pipelines, counts, arguments.active):
        try:
            near, far = measure(row, arguments.round_trip / 1e3, rounds)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"not measured: network namespaces cannot be made here ({error})")
            return 0
        config = row["config"]
        waited = (far - near) / arguments.round_trip
        print(
            f"{config['pipeline']:12} {config['microbatches']:3} {near:9.1f} {far:8.1f} "
            f"{waited:8.1f}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.exit(main())
