"""Ours against plain Keras and plain Keras against itself, by turns in one process."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

import models

Run = Callable[[], float]
Runs = Callable[[models.Workload], Sequence[Run]]


def full_size() -> list[models.Workload]:
    """Three models whose steps take 50 ms or more."""
    return [
        models.mlp(8, 1024, 256),
        models.cnn(32, 32, 64),
        models.transformer(2, 256, 64, 1000, 16),
    ]


def by_turns(
    runs: Sequence[Run], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> list[list[float]]:
    """Seconds of each run in each round, in which all run once, in random order.

    Args:
        runs: What is timed.
        rounds: How often each runs.
        clock: What tells the time in seconds.
    """
    times: list[list[float]] = [[] for _ in runs]
    random = np.random.default_rng(0)
    for _ in range(rounds):
        for which in random.permutation(len(runs)):
            start = clock()
            runs[which]()
            times[which].append(clock() - start)
    return times


def fit_of(
    workload: models.Workload,
    wrap: Callable[[keras.Model], keras.Model],
    batches: int,
    metrics: Sequence[str] = (),
) -> Run:
    """A function that trains for one epoch with `fit` and gives the loss.

    Args:
        workload: The model and one batch.
        wrap: Makes of the plain model what is trained.
        batches: How often the batch comes in an epoch.
        metrics: Those of `compile`.
    """
    keras.utils.set_random_seed(0)
    model = wrap(workload.build())
    model.compile(keras.optimizers.SGD(1e-3), models.loss_function(), metrics=list(metrics) or None)
    inputs, labels = (np.concatenate([part] * batches) for part in workload[2:4])
    rows = len(workload.inputs)

    def fit() -> float:
        history = model.fit(inputs, labels, batch_size=rows, shuffle=False, verbose=0)
        return float(history.history["loss"][0])

    return fit


def measure(
    runs: Sequence[Run],
    rounds: int,
    warm_up: int,
    tolerance: float,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, list[float], list[float]]:
    """Seconds of a plain run, its ratios to itself, and ours to it.

    Args:
        runs: A plain one, a second plain one, ours; each gives its loss.
        rounds: How often each runs, in random order.
        warm_up: How often each runs before.
        tolerance: By which their losses may differ after that, relative.
        clock: What tells the time in seconds.
    """
    for _ in range(warm_up):
        losses = [run() for run in runs]
    np.testing.assert_allclose(losses[1:], losses[0], rtol=tolerance)
    plain, again, ours = by_turns(runs, rounds, clock)
    return (
        statistics.median(plain),
        [b / a for a, b in zip(plain, again, strict=True)],
        [b / a for a, b in zip(plain, ours, strict=True)],
    )


def compare(
    workloads: Sequence[models.Workload],
    runs_of: Runs,
    rounds: int,
    warm_up: int,
    tolerance: float,
    columns: str,
    batches: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Prints a table; gives the largest median of our ratios.

    Args:
        workloads: A row for each.
        runs_of: Makes the three runs of a workload.
        rounds: See `measure`.
        warm_up: See `measure`.
        tolerance: See `measure`.
        columns: Heads of the second and third column, as they stand in the table.
        batches: Batches of one run.
        clock: What tells the time in seconds.
    """
    each = f" of {batches} batches" if batches > 1 else ""
    print(
        f"{os.cpu_count()} cores, Python {platform.python_version()}, TensorFlow "
        f"{tf.__version__}, Keras {keras.__version__}, {rounds} rounds{each}"
    )
    print(f"| model | {columns} | plain / plain |")
    print("| --- | --- | --- | --- |")
    worst = 0.0
    for workload in workloads:
        seconds, floor, ratios = measure(runs_of(workload), rounds, warm_up, tolerance, clock)
        worst = max(worst, statistics.median(ratios))
        print(
            f"| {workload.name} | {1e3 * seconds / batches:.0f} ms | {quartiles(ratios)} | "
            f"{quartiles(floor)} |",
            flush=True,
        )
    return worst


def quartiles(ratios: Sequence[float]) -> str:
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"
