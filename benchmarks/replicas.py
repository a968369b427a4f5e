"""Two replicas of a model, one core each: what summing up their gradients costs.

    python benchmarks/replicas.py

The same training step (forward and backward passes of M microbatches, SGD) on half of a batch as

- one process with one thread, plain Keras: nothing to sum up;
- two ranks of `opensmp run -n 2 --bind-cores`, a core and a half of the batch each, which sum up
  their gradients with `smp.allreduce`, as between machines: each gradient leaves when its last
  microbatch has given it, while the backward pass goes on to the layers before;
- the same as between CPUs of one machine: gradients leave when the backward pass has ended.

All of a row run in turns, a few steps at a time, while the others wait. A share is the median over
the rounds of the plain step over the step of the replicas: 1.00 if summing up cost nothing. On one
machine the data travel on the cores that compute, and little is gained by sending them early; for
a network of a given speed, slow the loopback device down meanwhile, as the superuser:

    tc qdisc add dev lo root tbf rate 2gbit burst 2mb latency 200ms
    tc qdisc del dev lo root

Prediction, written before the first measurement, without a slower loopback device: handing on
gradients early saves 3 % of a step on the MLP (64 MB of gradients) and 1 % on the Transformer
(29 MB). It gains 1 to 4 % on the MLP, and costs 2 to 3 % on the Transformer.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

from pipeline_speed import ALONE, WORKLOADS
from served import WARM_UP, Measured, answer_steps, in_turns, spread

EARLY, HELD_BACK = "early", "held back"
REPLICAS = 2


# ------------------------------------------------------------- the processes that are measured


def replica_step(workload: Any, microbatches: int, early: bool) -> Callable[..., Any]:
    import keras

    import models
    import opensmp as smp
    import overlap
    from opensmp.distributed.launch import cluster

    if early:  # ranks that take themselves to be on several machines
        name = cluster.machine_name()
        cluster.machine_name = lambda: f"{name} {os.environ['OPENSMP_RUN_RANK']}"
    smp.init({"microbatches": microbatches, "optimize": "speed", "devices": "cpu"})
    keras.utils.set_random_seed(0)
    model = smp.DistributedModel.from_keras(workload.build())
    optimizer = keras.optimizers.SGD(overlap.LEARNING_RATE)
    return models.split_step(model, optimizer, "add_n", reduce=smp.allreduce)


def serve(workload: str, microbatches: int, role: str, fifos: Sequence[str], answers: str) -> None:
    """Runs what the lines of this rank's FIFO ask for; rank 0 answers."""
    import tensorflow as tf

    import opensmp as smp
    import overlap

    made = overlap.WORKLOADS[workload]()
    rank = 0
    if role == ALONE:
        train_step = overlap.plain_step(made, microbatches)
    else:
        train_step = replica_step(made, microbatches, role == EARLY)
        rank = smp.rank()
    half = slice(rank, None, REPLICAS)
    data = tf.constant(made.inputs[half]), tf.constant(made.labels[half])
    answer_steps(train_step, data, rank, fifos, answers)


# ----------------------------------------------------------------------- the one that measures


def row(workload: str, microbatches: int, rounds: int) -> None:
    """Measures one row of the table."""
    common = ["--workloads", workload, "--microbatches", str(microbatches)]
    single = {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}
    one_core = ["taskset", "-c", "0"] if hasattr(os, "sched_setaffinity") else []
    running: dict[str, Measured] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            plain = [*one_core, sys.executable, __file__, "--serve", ALONE, *common]
            running[ALONE] = Measured(folder, "one", plain, 1, environments=[single])
            for role in (EARLY, HELD_BACK):
                launcher = [sys.executable, "-m", "opensmp", "run", "-n", str(REPLICAS)]
                launcher += ["--bind-cores", __file__, "--serve", role, *common]
                running[role] = Measured(folder, role, launcher, REPLICAS)
            losses = {name: process.steps(WARM_UP)["loss"] for name, process in running.items()}
            np.testing.assert_allclose(losses[EARLY], losses[HELD_BACK], rtol=1e-4)
            times = in_turns(running, rounds)
        finally:
            for process in running.values():
                process.end()
    cells = [workload, str(microbatches), f"{1e3 * statistics.median(times[ALONE]):.0f} ms"]
    for base, other in ((ALONE, EARLY), (ALONE, HELD_BACK), (HELD_BACK, EARLY)):
        cells.append(spread([b / t for b, t in zip(times[base], times[other], strict=True)]))
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, help="which models")
    parser.add_argument("--microbatches", nargs="+", type=int, help="which M")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each program")
    parser.add_argument("--quick", action="store_true", help="a small model, few steps")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--fifos", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--answers", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = arguments.workloads or (["quick"] if arguments.quick else ["mlp", "transformer"])
    counts = arguments.microbatches or ([4] if arguments.quick else [2, 4])
    if arguments.serve:
        serve(names[0], counts[0], arguments.serve, arguments.fifos, arguments.answers)
        return 0
    rounds = 2 if arguments.quick else arguments.rounds
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, {rounds} rounds\n")
    print("| model | M | one thread | gradients early | held back | early over held back |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for name in names:
        for count in counts:
            row(name, count, rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
