"""How well the cost model predicts the time of stages, against the stages themselves.

    python benchmarks/cost_model.py

Each of ten models is cut into stages. Their forward and backward functions, the ones that a
step would call, run alone on one thread, and the least processor time of several runs (that
of a machine that does nothing else) is compared with what the cost model says for the machine
that `calibrate` found. Nothing is fitted to the models. The stages have equal numbers of units
and so very different times.

Prediction, written before the first measurement: a roofline with one arithmetic speed for
all kinds of operations ranks stages well (Spearman above 0.9), and is wrong by up to a
factor of four where kernels are far from either roof: depthwise convolutions, and
convolutions with few channels.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import keras
import numpy as np
import tensorflow as tf

import models
from opensmp.compiler.costs.graph_costs import trainable_placeholders
from opensmp.compiler.lowering.program import Program
from opensmp.compiler.plan.coarsening.coarsen import coarsen, place
from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.plan.unit_graph import Machine
from opensmp.compiler.trace.trace import trace
from opensmp.execution.profiling.calibration import calibrate
from opensmp.execution.profiling.timing import segment_seconds

LEAST_CORRELATION = 0.8


class Case(NamedTuple):
    """A model and the inputs of one microbatch."""

    name: str
    build: Callable[[], keras.Model]
    inputs: Any


class Stage(NamedTuple):
    """Seconds of one stage, forward and backward."""

    predicted: tuple[float, float]
    measured: tuple[float, float]


def application(name: str, side: int, batch: int) -> Case:
    def build() -> keras.Model:
        make = getattr(keras.applications, name)
        return make(weights=None, input_shape=(side, side, 3), classes=10)

    return Case(f"{name}, {side} x {side}, batch {batch}", build, (batch, side, side, 3))


def workload(made: models.Workload) -> Case:
    return Case(made.name, made.build, made.inputs)


def stages(case: Case, num_stages: int, machine: Machine, repeats: int) -> list[Stage]:
    """Cuts a model into runs of units, and predicts and measures each."""
    keras.utils.clear_session()
    with keras.StatelessScope(initialize_variables=False):
        model = case.build()
    shape = case.inputs if isinstance(case.inputs, tuple) else None
    inputs = tf.zeros(shape) if shape else tf.convert_to_tensor(case.inputs)
    traced = trace(model.__call__, [inputs], {"training": True}, name=model.name)
    graph = coarsen(traced, machine)
    assignment = np.arange(len(graph)) * num_stages // len(graph)
    plan = Plan(traced.name, num_stages, place(traced, graph, assignment))
    program = Program(traced, plan, trainable_placeholders(traced))
    measured = np.zeros((num_stages, 2))
    for segment in program.segments:
        seconds = segment_seconds(
            program, segment, unknown_size=1, repeats=repeats, clock=time.process_time, pick=min
        )
        if seconds is not None:
            measured[segment.partition] += seconds
    forward = np.bincount(assignment, graph.forward_seconds, num_stages)
    backward = np.bincount(assignment, graph.backward_seconds, num_stages)
    return [
        Stage((float(f), float(b)), (float(m[0]), float(m[1])))
        for f, b, m in zip(forward, backward, measured, strict=True)
    ]


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's: the correlation of the ranks."""
    ranks = [np.argsort(np.argsort(values)) for values in (x, y)]
    return float(np.corrcoef(*ranks)[0, 1])


def report(times: Sequence[tuple[float, float]]) -> str:
    """Rank correlation, and the worst ratio in either direction, of (predicted, measured)."""
    predicted, measured = zip(*times, strict=True)
    ratios = [m / p for p, m in times if p and m]
    middle = float(np.exp(np.mean(np.log(ratios))))
    worst = max(max(ratio, 1 / ratio) for ratio in ratios)
    return f"{rank_correlation(predicted, measured):.3f} | {middle:.2f} | {worst:.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stages", type=int, default=4, help="stages of each model")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each stage")
    parser.add_argument("--quick", action="store_true", help="small models, few runs, no target")
    parser.add_argument("--verbose", action="store_true", help="print every stage")
    arguments = parser.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    if arguments.quick:
        repeats, cases = 3, [workload(models.mlp(4, 64, 8)), application("VGG16", 32, 1)]
    else:
        repeats = arguments.repeats
        cases = [
            application("VGG16", 64, 8),
            application("ResNet50", 64, 8),
            application("ResNet50V2", 96, 8),
            application("DenseNet121", 64, 8),
            application("MobileNetV2", 96, 8),
            application("EfficientNetB0", 96, 8),
            application("Xception", 96, 8),
            application("ConvNeXtTiny", 64, 8),
            workload(models.mlp(8, 1024, 64)),
            workload(models.transformer(4, 256, 64, 1000, 8)),
        ]
    machine = calibrate("CPU:0", refresh=not arguments.quick)
    print(
        f"{platform.processor() or platform.machine()}, 1 thread, TensorFlow {tf.__version__}, "
        f"Keras {keras.__version__}: {machine.flops_per_second / 1e9:.0f} GFLOP/s, "
        f"{machine.bytes_per_second / 1e9:.0f} GB/s, {machine.operation_seconds * 1e6:.1f} us "
        f"per operation; {arguments.stages} stages, least of {repeats} runs"
    )
    print("| model | measured | rank correlation | measured / predicted | worst factor |")
    print("| --- | --- | --- | --- | --- |")
    both: list[tuple[float, float]] = []
    each: list[tuple[float, float]] = []
    for case in cases:
        found = stages(case, arguments.stages, machine, repeats)
        sums = [(sum(stage.predicted), sum(stage.measured)) for stage in found]
        both += sums
        each += [pair for stage in found for pair in zip(*stage, strict=True)]
        milliseconds = 1e3 * sum(measured for _, measured in sums)
        print(f"| {case.name} | {milliseconds:.0f} ms | {report(sums)} |", flush=True)
        if arguments.verbose:
            for stage in found:
                for kind, predicted, took in zip("FB", *stage, strict=True):
                    print(f"    {kind} {1e3 * predicted:8.2f} {1e3 * took:8.2f} ms")
    print(f"| **all stages** | {1e3 * sum(m for _, m in both):.0f} ms | {report(both)} |")
    print(f"| forward and backward apart | | {report(each)} |")
    if arguments.quick:
        return 0
    correlation = rank_correlation(*zip(*both, strict=True))
    print(f"rank correlation {correlation:.3f}, target at least {LEAST_CORRELATION}")
    return int(correlation < LEAST_CORRELATION)


if __name__ == "__main__":
    sys.exit(main())
