"""What a microbatch keeps from its forward to its backward pass, by type of operation, and why.

    python benchmarks/kept.py
    python benchmarks/kept.py --torch-python /path/to/python   # with torch beside

Five models in two partitions: the MLP and the Transformer of `pipeline_speed.py`, a convolutional
network with batch normalisation, two LSTMs, and MobileNetV2; of each, a microbatch's forward and
backward functions. For each level of `recompute` the bytes of what is kept, measured as the forward
functions return it, by the type of the operation that made it. A tensor that shares the memory of
another one counts once; variables do not count, nor does the loss. Lists that loops collect count
with all their elements.

Then, for each kept tensor:

- Is it read? The backward pass runs with the tensor and with other values in its place (not
  numbers, other integers, other truths); if no gradient changes by a bit, the tensor is kept for
  nothing.
- Does it depend on the microbatch? It must be computed from an input, from state that the model
  changes (such as the seeds of dropout), or by an operation with state; and numbers must differ for
  other inputs and other state. Otherwise it depends on weights alone and could be computed anew.

If either finds a tensor, the exit status is 1. Left out are integers, a few bytes a step, that a
loop collects for the gradient of its input where nobody asks for that gradient: TensorFlow's
gradient of a loop computes those of all that the loop takes in, and they are shown in a row of
their own.

Torch's saved tensors of the two models of `pipeline_speed.py` are counted by
`torch.autograd.graph.saved_tensors_hooks`, each storage once, parameters left out, the loss not
part of the model.

Prediction, written before the first measurement of models of this size: neither check finds
anything; "none" keeps twice the bytes of torch on the MLP and 1.9 times on the Transformer, since
Keras composes GELU and layer normalisation from elementwise operations and attention keeps its
scores; "selective" keeps half of torch on the MLP and 0.6 on the Transformer.

Found: one LSTM of the first version of the lowering kept weights and last states for nothing, and
convolutions the shapes of their kernels; since then neither check finds anything. "none" keeps 1.97
of torch on the MLP and 1.74 on the Transformer, "selective" 0.55 on both, "full" 0.06 and 0.01.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import models
import overlap
from opensmp import _private
from opensmp.base.types import Op, Tensor
from opensmp.compiler.costs.graph_costs import trainable_placeholders
from opensmp.compiler.lowering.passes import Backward
from opensmp.compiler.lowering.program import Program
from opensmp.compiler.plan.methods.auto import auto_plan
from opensmp.compiler.recomputation.census import INPUT, kept_tensors
from opensmp.compiler.recomputation.policy import Policy
from opensmp.compiler.trace.trace import TracedGraph, trace
from opensmp.compiler.trace.variables import tf_variable

LEVELS = ("none", "selective", "full")
PARTITIONS, MICROBATCHES = 2, 4
LISTS = ("EmptyTensorList", "TensorListReserve", "TensorListFromTensor")
PEERS = ("mlp", "transformer", "quick")  # with a counterpart in torch


class Census(NamedTuple):
    """What a microbatch keeps at one level of `recompute`.

    Attributes:
        sizes: Bytes by partition and type of operation.
        idle: Bytes of integers that a loop collects for gradients that nobody has asked for.
        unread: Names of other kept tensors that no gradient depends on.
        of_weights: Names of kept tensors that depend on weights alone.
    """

    sizes: dict[tuple[int, str], int]
    idle: list[int]
    unread: list[str]
    of_weights: list[str]


def lstm(units: int, steps: int, batch: int) -> models.Workload:
    def build() -> keras.Model:
        inputs = keras.Input((steps, units // 2))
        x = keras.layers.LSTM(units, return_sequences=True)(inputs)
        x = keras.layers.LSTM(units)(x)
        return keras.Model(inputs, keras.layers.Dense(10)(x))

    rows = np.random.default_rng(0).normal(size=(batch, steps, units // 2)).astype("float32")
    return models.Workload(f"2 LSTMs of {units}, {steps} steps, batch {batch}", build, rows, None)


def mobile_net(width: float, side: int, batch: int) -> models.Workload:
    def build() -> keras.Model:
        return keras.applications.MobileNetV2(
            input_shape=(side, side, 3), alpha=width, weights=None, classes=10
        )

    rows = np.random.default_rng(0).normal(size=(batch, side, side, 3)).astype("float32")
    name = f"MobileNetV2, width {width:g}, {side} x {side}, batch {batch}"
    return models.Workload(name, build, rows, None)


WORKLOADS: dict[str, Callable[[], models.Workload]] = {
    "mlp": overlap.WORKLOADS["mlp"],
    "transformer": overlap.WORKLOADS["transformer"],
    "cnn": lambda: models.cnn(16, 32, 32),
    "lstm": lambda: lstm(64, 32, 32),
    "mobile_net": lambda: mobile_net(1.0, 64, 16),
}
QUICK: dict[str, Callable[[], models.Workload]] = {
    "quick": overlap.WORKLOADS["quick"],
    "transformer": lambda: models.transformer(2, 32, 16, 50, 8),
    "cnn": lambda: models.cnn(4, 16, 8),
    "lstm": lambda: lstm(16, 8, 8),
    "mobile_net": lambda: mobile_net(0.35, 32, 8),
}


# --------------------------------------------------------------------- one model at one level


def census(model: keras.Model, rows: Any, level: str) -> Census:
    """Lowers a model for a microbatch, runs its passes, and looks at what lies between them."""
    traced = trace(model, (rows,), {"training": True}, name="model")
    plan, leaves = auto_plan(traced, PARTITIONS), trainable_placeholders(traced)
    program = Program(traced, plan, leaves, split_backward=True, recompute=Policy(level))
    values, others = forward_values(program, rows, 0), forward_values(program, rows, 1)
    varying = varies(traced)
    found = Census({}, [], [], [])
    for segment in program.segments:
        if (backward := program.backward(segment, segment.outputs)) is None:
            continue
        random = np.random.default_rng(segment.index)
        for output, upstream in zip(
            backward.gradient.outputs, backward.gradient.upstream, strict=True
        ):
            noise = random.normal(size=values[id(output)].shape)
            values[id(upstream)] = tf.constant(noise, output.dtype)
        expected = gradients(backward, values)
        inputs = {id(t) for t in segment.inputs}
        for owner, read in kept_tensors(program, segment):
            kind = INPUT if id(owner) in inputs else owner.op.type
            value = content(read[0], values[id(read[0])])
            key = segment.partition, kind
            found.sizes[key] = found.sizes.get(key, 0) + value.numpy().nbytes
            if owner.op not in varying or is_weight(value, content(read[0], others[id(read[0])])):
                found.of_weights.append(owner.name)
            other = values | {id(t): changed(t, values[id(t)]) for t in read}
            if is_same(expected, gradients(backward, other)):
                if owner.dtype == tf.variant and value.dtype.is_integer:
                    found.idle.append(value.numpy().nbytes)
                else:
                    found.unread.append(owner.name)
    return found


def forward_values(program: Program, rows: Any, shift: int) -> dict[int, Any]:
    """What forward passes take and return, for rows and state that are shifted."""
    state = {id(variable) for variable, _ in program.traced.updates}
    rows = tf.roll(rows, [shift] * rows.shape.rank, list(range(rows.shape.rank)))
    values = {id(program.traced.inputs[0]): rows}
    for each in program.traced.variables:
        value = tf.convert_to_tensor(tf_variable(each.variable))
        is_state = id(each.variable) in state
        values[id(each.placeholder)] = value + tf.cast(shift, value.dtype) if is_state else value
    for segment in program.segments:
        forward = program.forward(segment)
        results = forward.kept(forward.function(*(values[id(t)] for t in forward.feeds)))
        made = (*forward.outputs, *forward.residuals)
        values |= {id(t): value for t, value in zip(made, results, strict=False)}
    return values


def is_weight(value: Any, other: Any) -> bool:
    """Whether numbers are the same for other rows and state, and not just all zero."""
    return bool(
        value.dtype.is_floating
        and np.any(value)
        and value.numpy().tobytes() == other.numpy().tobytes()
    )


def varies(traced: TracedGraph) -> set[Op]:
    """The operations that depend on inputs, on state that the model changes, or that have state."""
    state = {id(variable) for variable, _ in traced.updates}
    found = {t.op for t in traced.inputs}
    found |= {v.placeholder.op for v in traced.variables if id(v.variable) in state}
    for op in traced.graph.get_operations():
        if _private.is_stateful(op) or any(t.op in found for t in op.inputs):
            found.add(op)
    return found


def gradients(backward: Backward, values: Mapping[int, Any]) -> list[Any] | None:
    """What a backward pass computes with all its parts; None if it fails."""
    values, found = dict(values), []
    half: Backward | None = backward
    try:
        if (again := backward.recompute) is not None:
            results = again.function(*(values[id(t)] for t in again.feeds))
            values |= zip(map(id, again.fetches), results, strict=True)
        while half is not None:
            results = half.function(*(values[id(t)] for t in half.feeds))
            number = len(half.gradient.flat)
            found += results[:number]
            values |= zip(map(id, half.handed), results[number:], strict=True)
            half = half.weights
    except tf.errors.InvalidArgumentError:  # such as a shape that fits nothing
        return None
    return found


def is_same(expected: list[Any] | None, found: list[Any] | None) -> bool:
    if expected is None or found is None:
        return expected is found
    pairs = zip(expected, found, strict=True)
    return all(a.numpy().tobytes() == b.numpy().tobytes() for a, b in pairs)


def content(tensor: Tensor, value: Any) -> Any:
    """The value of a tensor; the elements of a list, one after another."""
    if tensor.dtype != tf.variant:
        return value
    while tensor.op.type not in LISTS:  # a result of the loop that has collected it
        tensor = tensor.op.inputs[tensor.value_index]
    return tf.raw_ops.TensorListStack(
        input_handle=value, element_shape=-1, element_dtype=tensor.op.get_attr("element_dtype")
    )


def changed(tensor: Tensor, value: Any) -> Any:
    """Another value of the same shape and type."""
    before = content(tensor, value)
    if before.dtype == tf.bool:
        after = tf.logical_not(before)
    elif before.dtype.is_integer:
        after = before + 1
    else:
        after = tf.fill(before.shape, tf.constant(np.nan, before.dtype))
    if tensor.dtype != tf.variant:
        return after
    shape = tf.constant(before.shape[1:].as_list(), tf.int32)
    return tf.raw_ops.TensorListFromTensor(tensor=after, element_shape=shape)


# ------------------------------------------------------------------------------------- tables


def show(name: str, workload: models.Workload, torch: Mapping[str, int] | None) -> list[str]:
    """Prints the table of a model; returns what is kept for nothing, or depends on weights."""
    keras.utils.set_random_seed(0)
    model = workload.build()
    rows = tf.constant(workload.inputs[: len(workload.inputs) // MICROBATCHES])
    found = {level: census(model, rows, level) for level in LEVELS}
    print(f"\n{workload.name}, a microbatch of {len(rows)}, KiB\n")
    print(f"| made by | {' | '.join(LEVELS)} |")
    print(f"|{' --- |' * (1 + len(LEVELS))}")
    sums = {level: by_type(found[level]) for level in LEVELS}
    kinds = sorted({kind for each in sums.values() for kind in each})
    for kind in sorted(kinds, key=lambda kind: [-sums[level].get(kind, 0) for level in LEVELS]):
        print_row(kind, [sums[level].get(kind, 0) for level in LEVELS])
    for partition in range(PARTITIONS):
        print_row(
            f"partition {partition}",
            [
                sum(size for (where, _), size in found[level].sizes.items() if where == partition)
                for level in LEVELS
            ],
        )
    totals = [sum(sums[level].values()) for level in LEVELS]
    print_row("all", totals)
    if any(each.idle for each in found.values()):
        print_row("integers of loops, not read", [sum(found[level].idle) for level in LEVELS])
    if torch is not None:
        print("\n| made by, in torch | KiB |\n| --- | --- |")
        for kind, size in torch.items():
            print_row(kind, [size])
        print_row("all", [sum(torch.values())])
        shares = [f"{total / sum(torch.values()):.2f}" for total in totals]
        print(f"\nShare of what torch keeps, {', '.join(LEVELS)}: {', '.join(shares)}")
    sys.stdout.flush()
    return [
        f"{name}, {level}: {tensor} {fault}"
        for level, each in found.items()
        for fault, tensors in (
            ("is kept, and no gradient depends on it", each.unread),
            ("is kept, and depends on weights alone", each.of_weights),
        )
        for tensor in tensors
    ]


def by_type(found: Census) -> dict[str, int]:
    sums: dict[str, int] = {}
    for (_, kind), size in found.sizes.items():
        sums[kind] = sums.get(kind, 0) + size
    return sums


def print_row(name: str, sizes: Sequence[int]) -> None:
    print(f"| {name} | {' | '.join(f'{size / 1024:.1f}' for size in sizes)} |")


def torch_kept(python: str, names: Sequence[str]) -> dict[str, dict[str, int]]:
    """What torch keeps of the workloads that both have."""
    script = Path(__file__).with_name("peer_kept.py")
    command = [python, str(script), "--workloads", *names, "--microbatches", str(MICROBATCHES)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(zip(names, map(json.loads, done.stdout.splitlines()), strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--torch-python", help="a Python that has torch 2.13, to count it too")
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, help="which models")
    parser.add_argument("--quick", action="store_true", help="small models")
    arguments = parser.parse_args()
    workloads = QUICK if arguments.quick else WORKLOADS
    workloads = {n: w for n, w in workloads.items() if n in (arguments.only or workloads)}
    torch: dict[str, dict[str, int]] = {}
    peers = [name for name in workloads if name in PEERS and (name == "quick") == arguments.quick]
    if arguments.torch_python is None:
        print("torch not found: give a Python that has it as --torch-python")
    elif peers:
        torch = torch_kept(arguments.torch_python, peers)
    faults = []
    for name, workload in workloads.items():
        faults += show(name, workload(), torch.get(name))
    print("\n" + ("\n".join(faults) or "All that is kept is read, and depends on the microbatch."))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
