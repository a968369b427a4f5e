"""What `check_finite` costs: the same training step with and without it, in one process.

    python benchmarks/check_finite.py

Three copies of a training step on one batch, one partition: two without checks (the second one
is the noise floor) and one with. A round runs each once, in random order. What is compared is the
processor time of the process, all threads together, which other programs on the machine disturb
less than the time on the clock; ratios are of runs of the same round.

Prediction, written before the first measurement: each activation of a layer and each gradient of a
variable is read once more, to be added up, while a Dense layer reads it many times: a kernel of
1024 x 1024 is added up in about 0.1 ms, and its gradient from 256 rows takes 5 ms or more. Looking
at the flags in Python takes 0.1 ms a step. Expected: medians below 1.02.

Found on two quiet cores: 1.02 (MLP) and 1.04 (Transformer) with one microbatch, 1.05 to 1.07 with
four, so not below 1.02 for models this small: a core adds up 10 GB a second here, and each kernel
gradient is read for each microbatch.

So less is read since: tensors from which sums and products lead to another checked tensor are
not read, and gradients of kernels are bounded by the norms of their factors where these are
smaller (`opensmp.compiler.lowering.finite_cover`). A Transformer of two blocks reads 8 of the 36 MB
of its activations, an MLP of 1024 units with 64 rows a microbatch an eighth of its gradients'.
Predicted: at most 1.01. Found on two quiet cores: MLP 1.018 and 1.011 (one and four microbatches),
Transformer of 256 1.05 to 1.065 and 1.016, of 768 with one 1.012. In one run of the Transformer of
256 with one microbatch: 1.053, with each tensor read 1.065, without the outputs of layers that a
forward pass keeps for naming them 1.025. So for that one it is still not below 1.02.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import models
import opensmp as smp
import paired

TARGET = 1.02
WARM_UP = 3

Run = Callable[[], float]


def step_of(workload: models.Workload, microbatches: int, checks: bool) -> Run:
    """A training step that has been traced with or without checks."""
    smp.shutdown()
    smp.init({"partitions": 1, "microbatches": microbatches, "check_finite": checks})
    keras.utils.set_random_seed(0)
    model = smp.DistributedModel.from_keras(workload.build())
    train_step = models.split_step(model, keras.optimizers.SGD(1e-3))
    inputs, labels = tf.constant(workload.inputs), tf.constant(workload.labels)
    for _ in range(WARM_UP):
        train_step(inputs, labels)
    traced = train_step.get_concrete_function(inputs, labels)
    return lambda: float(traced(inputs, labels))


def measure(workload: models.Workload, microbatches: int, rounds: int) -> float:
    """Prints a row of the table; gives the median of the ratios."""
    runs = [step_of(workload, microbatches, checks) for checks in (False, False, True)]
    np.testing.assert_array_equal(runs[1](), runs[0]())
    runs[2]()
    plain, again, checked = paired.by_turns(runs, rounds, time.process_time)
    ratios = [c / p for c, p in zip(checked, plain, strict=True)]
    floor = [a / p for a, p in zip(again, plain, strict=True)]
    print(
        f"| {workload.name} | {microbatches} | {1e3 * statistics.median(plain):.0f} ms | "
        f"{paired.quartiles(ratios)} | {paired.quartiles(floor)} |",
        flush=True,
    )
    return statistics.median(ratios)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60, help="runs of each step")
    parser.add_argument("--quick", action="store_true", help="small models, few runs, no target")
    parser.add_argument("--only", default="", help="only models whose name has this")
    arguments = parser.parse_args()
    rounds = 3 if arguments.quick else arguments.rounds
    workloads = [
        models.mlp(8, 1024, 256),
        models.transformer(2, 256, 64, 1000, 16),
        models.transformer(1, 768, 128, 1000, 32),
    ]
    if arguments.quick:
        workloads = [models.mlp(2, 64, 8), models.transformer(1, 16, 8, 50, 4)]
    workloads = [workload for workload in workloads if arguments.only in workload.name]
    print(f"{os.cpu_count()} cores, TensorFlow {tf.__version__}, {rounds} rounds")
    print("| model | microbatches | step, processor time | checked / plain | plain / plain |")
    print("| --- | --- | --- | --- | --- |")
    worst = max(measure(workload, count, rounds) for workload in workloads for count in (1, 4))
    if arguments.quick:
        return 0
    print(f"largest median {worst:.3f}, target at most {TARGET}")
    return int(worst > TARGET)


if __name__ == "__main__":
    sys.exit(main())
