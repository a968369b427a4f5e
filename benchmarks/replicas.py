"""Two replicas of a model, one core each: what summing up their gradients costs.

    python benchmarks/replicas.py --torch-python /path/to/python

The same training step (forward and backward passes of M microbatches, SGD) on half of a batch as

- one process with one thread, plain Keras: nothing to sum up;
- two ranks of `opensmp run -n 2 --bind-cores`, a core and a half of the batch each, which sum up
  their gradients with `smp.allreduce`: "early" if each gradient leaves when its last microbatch
  has given it, while the backward pass goes on to the layers before, and "held back" if all leave
  when the backward pass has ended;
- "collective": held back, by TensorFlow's collectives instead of through shared memory, as between
  machines ("early, collective" is what replicas on several machines do);
- "mirrored": `tf.distribute.MirroredStrategy` on two logical CPUs of one process;
- with `--torch-python`, "torch DDP": two processes with `DistributedDataParallel`, gloo and one
  thread each, beside "torch, one thread".

All of a row run in turns, a few steps at a time, while the others wait. A share is the median over
the rounds of the plain step over the step of the replicas: 1.00 if summing up cost nothing. torch's
is of torch's own plain step. For a network of a given speed, slow the loopback device down
meanwhile, as the superuser:

    tc qdisc add dev lo root tbf rate 2gbit burst 2mb latency 200ms
    tc qdisc del dev lo root

Predictions, each written before the first measurement. TensorFlow's collectives, without a slower
loopback device: handing on gradients early saves 3 % of a step on the MLP (64 MB of gradients) and
1 % on the Transformer (29 MB). It gained 1 to 4 % on the MLP, and cost 2 to 3 % on the Transformer.
Sums through shared memory (a copy into it, and one pass that adds up, instead of five copies and
two sockets): the share of the MLP rises from 0.55 to 0.75, beyond torch DDP and MirroredStrategy;
that of the Transformer from 0.94 to 0.97; and early is better by 3 %, since a gradient is still in
the cache when it is copied. On busy cores the MLP had 0.50 (collectives 0.38, torch DDP 0.48), 0.47
early; the Transformer is still to be measured.
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

from pipeline_speed import ALONE, WORKLOADS, free_port
from served import WARM_UP, Measured, answer_steps, in_turns, spread

EARLY, HELD_BACK = "early", "held back"
OURS = (EARLY, HELD_BACK, f"{EARLY}, collective", "collective")
MIRRORED, DDP, TORCH_ALONE = "mirrored", "torch DDP", f"torch, {ALONE}"
PROGRAMS = (*OURS, MIRRORED, DDP)
REPLICAS = 2


# ------------------------------------------------------------- the processes that are measured


def replica_step(workload: Any, microbatches: int, role: str) -> Callable[..., Any]:
    import dataclasses

    import keras

    import models
    import opensmp as smp
    import overlap
    from opensmp.distributed import world

    transport = "collective" if "collective" in role else "auto"
    config = {"microbatches": microbatches, "optimize": "speed", "devices": "cpu"}
    smp.init({**config, "transport": transport})
    world.set_current(dataclasses.replace(world.current(), sums_early=EARLY in role))
    keras.utils.set_random_seed(0)
    model = smp.DistributedModel.from_keras(workload.build())
    optimizer = keras.optimizers.SGD(overlap.LEARNING_RATE)
    return models.split_step(model, optimizer, "add_n", reduce=smp.allreduce)


def mirrored_step(workload: Any, microbatches: int) -> Callable[..., Any]:
    """A step that takes the whole batch; each replica reads every second row of it."""
    import keras
    import tensorflow as tf

    import models
    import overlap

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(REPLICAS)
    (cpu,) = tf.config.list_physical_devices("CPU")
    logical = [tf.config.LogicalDeviceConfiguration() for _ in range(REPLICAS)]
    tf.config.set_logical_device_configuration(cpu, logical)
    strategy = tf.distribute.MirroredStrategy([f"CPU:{number}" for number in range(REPLICAS)])
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model, loss_fn = workload.build(), models.loss_function()
        optimizer = keras.optimizers.SGD(overlap.LEARNING_RATE)
        optimizer.build(model.trainable_variables)

    def replica(inputs, labels):
        losses, gradients = [], []
        parts = zip(tf.split(inputs, microbatches), tf.split(labels, microbatches), strict=True)
        for x, y in parts:
            with tf.GradientTape() as tape:
                # Keras divides by the number of replicas, and the optimizer adds up.
                losses.append(loss_fn(y, model(x, training=True)))
            gradients.append(tape.gradient(losses[-1], model.trainable_variables))
        means = [overlap.mean(parts) for parts in zip(*gradients, strict=True)]
        optimizer.apply_gradients(zip(means, model.trainable_variables, strict=True))
        return tf.add_n(losses) / microbatches

    @tf.function
    def train_step(inputs, labels):
        values = [
            strategy.experimental_distribute_values_from_function(
                lambda context, data=data: data[context.replica_id_in_sync_group :: REPLICAS]
            )
            for data in (inputs, labels)
        ]
        losses = strategy.run(replica, args=tuple(values))
        return strategy.reduce("SUM", losses, axis=None)

    return train_step


def serve(workload: str, microbatches: int, role: str, fifos: Sequence[str], answers: str) -> None:
    """Runs what the lines of this rank's FIFO ask for; rank 0 answers."""
    import tensorflow as tf

    import opensmp as smp
    import overlap

    made = overlap.WORKLOADS[workload]()
    rank, rows = 0, slice(0, None, REPLICAS)
    if role == ALONE:
        train_step = overlap.plain_step(made, microbatches)
    elif role == MIRRORED:
        train_step, rows = mirrored_step(made, microbatches), slice(None)
    else:
        train_step = replica_step(made, microbatches, role)
        rank = smp.rank()
        rows = slice(rank, None, REPLICAS)
    data = tf.constant(made.inputs[rows]), tf.constant(made.labels[rows])
    answer_steps(train_step, data, rank, fifos, answers)


# ----------------------------------------------------------------------- the one that measures


def row(
    workload: str,
    microbatches: int,
    rounds: int,
    programs: Sequence[str],
    torch_python: str | None,
) -> None:
    """Measures one row of the table."""
    common = ["--microbatches", str(microbatches)]
    served = ["--workloads", workload, *common]
    single = {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}
    one_core = ["taskset", "-c", "0"] if hasattr(os, "sched_setaffinity") else []
    running: dict[str, Measured] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            plain = [*one_core, sys.executable, __file__, "--serve", ALONE, *served]
            running[ALONE] = Measured(folder, "one", plain, 1, environments=[single])
            for role in [role for role in OURS if role in programs]:
                launcher = [sys.executable, "-m", "opensmp", "run", "-n", str(REPLICAS)]
                launcher += ["--bind-cores", __file__, "--serve", role, *served]
                running[role] = Measured(folder, role, launcher, REPLICAS)
            if MIRRORED in programs:
                mirrored = [sys.executable, __file__, "--serve", MIRRORED, *served]
                running[MIRRORED] = Measured(folder, MIRRORED, mirrored, 1)
            if torch_python is not None and DDP in programs:
                script = str(Path(__file__).with_name("peer_torch.py"))
                torch = [torch_python, script, "--workload", workload, *common, "--half"]
                command = [*one_core, *torch, "--schedule", "one thread"]
                running[TORCH_ALONE] = Measured(folder, "torch one", command, 1)
                port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
                each = {**port, "WORLD_SIZE": str(REPLICAS), "OMP_NUM_THREADS": "1"}
                ranks = [{**each, "RANK": str(rank)} for rank in range(REPLICAS)]
                command = [*torch, "--schedule", "ddp"]
                running[DDP] = Measured(folder, DDP, command, REPLICAS, environments=ranks)
            first = {name: process.steps(WARM_UP) for name, process in running.items()}
            losses = [first[name]["loss"] for name in (*OURS, MIRRORED) if name in running]
            np.testing.assert_allclose(losses, losses[0], rtol=1e-4)
            times = in_turns(running, rounds)
        finally:
            for process in running.values():
                process.end()
    cells = [workload, str(microbatches), f"{1e3 * statistics.median(times[ALONE]):.0f} ms"]
    for name in [name for name in PROGRAMS if name in running]:
        base = times[TORCH_ALONE if name == DDP else ALONE]
        cells.append(spread([b / t for b, t in zip(base, times[name], strict=True)]))
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, help="which models")
    parser.add_argument("--microbatches", nargs="+", type=int, help="which M")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each program")
    parser.add_argument("--torch-python", help="a Python that has torch 2.13, to measure it too")
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, help="measure only these")
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
    programs = [
        program
        for program in arguments.only or PROGRAMS
        if program != DDP or arguments.torch_python is not None
    ]
    shown = [program for program in PROGRAMS if program in programs]
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, {rounds} rounds\n")
    print(f"| model | M | one thread | {' | '.join(shown)} |")
    print(f"|{' --- |' * (3 + len(shown))}", flush=True)
    for name in names:
        for count in counts:
            row(name, count, rounds, programs, arguments.torch_python)
    return 0


if __name__ == "__main__":
    sys.exit(main())
