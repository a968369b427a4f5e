"""Simulated steps beside steps of two ranks on this machine: `simulation.py --measure`.

The times of a model's layers are measured on one core, the model is planned as the ranks plan it,
and the plan is simulated. The ranks run with a core each. No number is fitted to the steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

SCHEDULES = {
    "simple": ("simple", 1),
    "1f1b": ("interleaved", 1),
    "interleaved": ("interleaved", 2),
    "zero bubble": ("zero_bubble", 1),
    "zero bubble V": ("zb_v", 2),
}
RANKS = 2
BYTES_PER_SECOND, LATENCY_SECONDS = 2e9, 1.5e-3
"""Of the link between two processes, as the planner has it from a measurement."""


def serve(workload: str, microbatches: int, schedule: str, steps: int) -> None:
    """In each rank: runs steps; rank 0 prints their times."""
    import tensorflow as tf

    import opensmp as smp
    import overlap

    made = overlap.WORKLOADS[workload]()
    pipeline, pieces = SCHEDULES[schedule]
    train_step = overlap.pipelined_step(made, microbatches, pipeline, pieces)
    data = tf.constant(made.inputs), tf.constant(made.labels)
    times = []
    for _ in range(3 + steps):
        start = time.perf_counter()
        float(train_step(*data))
        times.append(time.perf_counter() - start)
    if smp.rank() == 0:
        print("MEASURED " + json.dumps(times[3:]))


def predict(workload: str, microbatches: int) -> dict[str, float]:
    """In a process with one thread: measures the layers, and simulates all schedules."""
    import tensorflow as tf

    import overlap
    from opensmp.cli.models.dry_run import build_model, dry_trace
    from opensmp.compiler.cluster.cluster import Cluster
    from opensmp.compiler.cluster.links import Link
    from opensmp.compiler.plan.coarsening.coarsen import coarsen
    from opensmp.compiler.plan.methods.auto import plan_units
    from opensmp.compiler.plan.settings import PlanSettings
    from opensmp.compiler.plan.unit_graph import PROCESSES
    from opensmp.execution.profiling.calibration import measure

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    made = overlap.WORKLOADS[workload]()
    model = build_model(made.build, {}, workload)
    shape = (len(made.inputs) // microbatches, *made.inputs.shape[1:])
    traced = dry_trace(model, tf.TensorSpec(shape, made.inputs.dtype), training=True)
    graph = coarsen(traced, PROCESSES)
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(traced, graph, device="CPU:0", cache=folder)
    cluster = Cluster(1, RANKS, within=Link("", BYTES_PER_SECOND, LATENCY_SECONDS))
    found = {}
    for name, (pipeline, pieces) in SCHEDULES.items():
        settings = PlanSettings(
            microbatches, pipeline, optimize="speed", pieces=pieces, machine=PROCESSES
        )
        plan = plan_units(traced, graph, RANKS, settings)
        # Of the update only plain gradient descent is run, which reads and writes the weights.
        step = replace(plan, graph=measured).simulate(cluster)
        found[name] = step.seconds - step.parts["update of weights"]
    return found


def asked(*arguments: str, ranks: int = 1) -> Any:
    """Runs this file in processes of its own, and returns what they print."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "opensmp", "run", "-n", str(ranks), "--bind-cores"]
        launcher += ["--idle-seconds", "60"]
    elif hasattr(os, "sched_setaffinity"):
        launcher = ["taskset", "-c", "0", *launcher]
    done = subprocess.run(
        [*launcher, str(Path(__file__)), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    lines = [line.split("MEASURED ")[1] for line in done.stdout.splitlines() if "MEASURED " in line]
    return json.loads(lines[-1])


def table(
    workloads: list[str], microbatches: int, steps: int, schedules: Iterable[str] = SCHEDULES
) -> list[float]:
    """Prints the table; returns by how many percent predictions are off."""
    print(f"\n## Steps of two ranks on this machine, {microbatches} microbatches\n")
    titles = ("model", "schedule", "measured, least", "median", "simulated", "simulated / least")
    print(f"| {' | '.join(titles)} |\n|{' --- |' * len(titles)}", flush=True)
    misses = []
    for workload in workloads:
        common = ["--workload", workload, "--microbatches", str(microbatches)]
        predicted = asked("--predict", *common)
        for name in schedules:
            times = asked("--serve", name, "--steps", str(steps), *common, ranks=RANKS)
            least, median = min(times), statistics.median(times)
            misses.append(100 * (predicted[name] / least - 1))
            cells = [f"{1e3 * x:.0f} ms" for x in (least, median, predicted[name])]
            print(
                f"| {workload} | {name} | {' | '.join(cells)} | {predicted[name] / least:.2f} |",
                flush=True,
            )
    return misses


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--serve", choices=SCHEDULES)
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--workload", default="mlp")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.workload, arguments.microbatches, arguments.serve, arguments.steps)
    elif arguments.predict:
        print("MEASURED " + json.dumps(predict(arguments.workload, arguments.microbatches)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
