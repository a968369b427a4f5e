"""Measured inputs of the cost model: the speed of a device, and the times of a model's units."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import platform
import tempfile
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from opensmp.base.strict_json import parse_json
from opensmp.base.types import Tensor
from opensmp.compiler.costs.graph_costs import UNKNOWN_SIZE, trainable_placeholders
from opensmp.compiler.costs.op_graph import Wiring
from opensmp.compiler.lowering.program import Program
from opensmp.compiler.plan.coarsening.coarsen import place
from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.plan.serialization.checked_fields import check_machine
from opensmp.compiler.plan.unit_graph import CoarseGraph, Machine
from opensmp.compiler.trace.trace import TracedGraph
from opensmp.execution.profiling.timing import seconds_of, segment_seconds

Folder = str | os.PathLike[str]

_FORMAT = 2
_CHAIN = 300
_ROUNDS = 12


def cache_folder() -> Path:
    """Folder of cached measurements: `opensmp` in the user's cache folder.

    The user's cache folder is `$XDG_CACHE_HOME`, or `~/.cache` if it is not set (XDG Base Directory
    Specification).
    """
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "opensmp"


def device_key(device: str) -> str:
    """Cache key of a device: everything its speed depends on, such as the name of a processor."""
    kind = _kind(device)
    name = platform.machine()
    if kind == "GPU":
        (physical, *_) = tf.config.list_physical_devices("GPU")
        name = tf.config.experimental.get_device_details(physical).get("device_name", "GPU")
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else name
    threads = tf.config.threading.get_intra_op_parallelism_threads() or os.cpu_count()
    beside = f", {threads} threads" if kind == "CPU" else ""
    return f"{kind} {name}{beside}, TensorFlow {tf.__version__}"


def a_device() -> str:
    """The first GPU, or the CPU if there is none."""
    return "GPU:0" if tf.config.list_logical_devices("GPU") else "CPU:0"


def calibrate(
    device: str | None = None, *, cache: Folder | None = None, refresh: bool = False
) -> Machine:
    """Measures the speed of a device, which takes some seconds, and caches the result in a file.

    Times the product of two matrices and a grouped convolution for arithmetic, a row times a matrix
    that exceeds all caches for memory, a chain of tiny operations for the launch overhead, and a
    tensor sent back and forth between two devices of the same kind for transfers. With only one
    device, transfers keep the defaults of `Machine`.

    Args:
        device: A logical device; None for the first GPU, or the CPU if there is none.
        cache: Folder of the file; None for `cache_folder()`.
        refresh: Whether to measure again.

    Returns:
        A machine without a memory limit.
    """
    device = device or a_device()
    path = Path(cache or cache_folder()) / "machines.json"
    known = _read(path)
    key = device_key(device)
    if refresh or not _is_machine(known.get(key)):
        known[key] = dataclasses.asdict(_measure_machine(device))
        _write(path, known)
    return Machine(**known[key])


def measure(
    traced: TracedGraph,
    graph: CoarseGraph,
    *,
    device: str = "CPU:0",
    required: Collection[Tensor] | None = None,
    unknown_size: int = UNKNOWN_SIZE,
    cache: Folder | None = None,
    refresh: bool = False,
) -> CoarseGraph:
    """Replaces the predicted times of units by measured ones.

    Lowers each unit to a forward and a backward function, as if it were a partition, and runs them
    with random values. This takes seconds to minutes, and the memory of the largest unit; the
    result is cached in a file, by graph and device. Units that read handles keep their prediction.

    Returns:
        The units with measured times, in seconds.
    """
    wanted = trainable_placeholders(traced) if required is None else tuple(required)
    name = graph_key(traced, graph, wanted, unknown_size)
    path = Path(cache or cache_folder()) / "units" / f"{name}.json"
    known = _read(path)
    key = device_key(device)
    if refresh or not _are_pairs(known.get(key), len(graph)):
        known[key] = _measure_units(traced, graph, device, wanted, unknown_size)
        _write(path, known)
    predicted = zip(graph.forward_seconds, graph.backward_seconds, strict=True)
    pairs = [
        (float(old[0]), float(old[1])) if new is None else new
        for old, new in zip(predicted, known[key], strict=True)
    ]
    return dataclasses.replace(
        graph,
        forward_seconds=np.array([forward for forward, _ in pairs]),
        backward_seconds=np.array([backward for _, backward in pairs]),
    )


def graph_key(
    traced: TracedGraph, graph: CoarseGraph, required: Collection[Tensor], unknown_size: int
) -> str:
    """Cache key of a graph: a hash of dtypes, shapes, attributes and units, without names."""
    wiring = Wiring.of(traced.operations, unknown_size)
    number = {op.name: i for i, op in enumerate(wiring.operations)}
    units = [[number[name] for name in operations] for operations in graph.operations]
    leaves = sorted(wiring.index[t.op] for t in required)
    digest = hashlib.sha256(repr((_FORMAT, wiring.types, wiring.inputs, wiring.arrays)).encode())
    digest.update(repr((units, leaves)).encode())
    return digest.hexdigest()[:32]


# --- measuring --------------------------------------------------------------------------------


def _kind(device: str) -> str:
    return device.rpartition("device:")[2].partition(":")[0].upper()


def _measure_machine(device: str) -> Machine:
    side, rows = (4096, 16384) if _kind(device) == "GPU" else (512, 4096)
    with tf.device(device):
        matrix, small = tf.ones([side, side]), tf.ones([16, 16])
        large, row = tf.ones([rows, rows]), tf.ones([1, rows])

        def chain(x: Tensor) -> Tensor:
            for _ in range(_CHAIN // 3):
                x = tf.nn.softmax(tf.linalg.matmul(x, small) + small)
            return x

        # A convolution as Keras emits it, with one channel per group.
        image, kernel = tf.ones([8, 16, 16, 64]), tf.ones([3, 3, 1, 64])

        call, launches, product, passing, grouped = _least(
            (lambda x: tf.linalg.matmul(x, small), small),
            (chain, small),
            (lambda x: tf.linalg.matmul(x, matrix)[:1, :1], matrix),
            (lambda x: tf.linalg.matmul(x, large), row),
            (lambda x: keras.ops.conv(x, kernel, padding="same"), image),
        )
    latency, bandwidth = _measure_transfer(device)
    return Machine(
        flops_per_second=2.0 * side**3 / max(product - call, 1e-6),
        narrow_flops_per_second=2.0 * 9 * math.prod(image.shape) / max(grouped - call, 1e-6),
        bytes_per_second=4.0 * rows**2 / max(passing - call, 1e-6),
        operation_seconds=max((launches - call) / _CHAIN, 1e-8),
        transfer_seconds=latency,
        transfer_bytes_per_second=bandwidth,
    )


def _least(*cases: tuple[Any, Tensor]) -> list[float]:
    """Minimum time of many calls of each function, which estimates its time on an idle machine.

    The functions alternate, so that a temporary load slows down all of them.
    """
    compiled = [
        (tf.function(function, autograph=False).get_concrete_function(x), x)
        for function, x in cases
    ]
    least = [float("inf")] * len(cases)
    for _ in range(_ROUNDS):
        for k, (function, x) in enumerate(compiled):
            run = functools.partial(function, x)
            least[k] = min(least[k], seconds_of(run, repeats=3, pick=min))
    return least


def _measure_transfer(device: str) -> tuple[float, float]:
    """Latency in seconds and bandwidth in bytes per second between two devices of the same kind."""
    others = [d.name for d in tf.config.list_logical_devices(_kind(device))]
    if len(others) < 2:
        default = Machine()
        return default.transfer_seconds, default.transfer_bytes_per_second

    def roll(x: Tensor, devices: Sequence[str]) -> Tensor:
        for name in devices:
            with tf.device(name):
                x = tf.roll(x, 1, 0)
        return x

    seconds = []
    for length in (4, 2**21):
        with tf.device(others[0]):
            x = tf.ones([length])
            moved, stayed = _least(
                (lambda x: roll(x, others[1::-1] * 4), x), (lambda x: roll(x, others[:1] * 8), x)
            )
        seconds.append(max(1e-7, (moved - stayed) / 8))
    return seconds[0], 4.0 * 2**21 / max(seconds[1] - seconds[0], 1e-6)


def _measure_units(
    traced: TracedGraph,
    graph: CoarseGraph,
    device: str,
    required: Collection[Tensor],
    unknown_size: int,
) -> list[tuple[float, float] | None]:
    plan = Plan(traced.name, max(len(graph), 1), place(traced, graph, np.arange(len(graph))))
    program = Program(traced, plan, required)
    seconds: list[tuple[float, float] | None] = [(0.0, 0.0)] * len(graph)
    with tf.device(device):
        for segment in program.segments:
            new = segment_seconds(program, segment, unknown_size=unknown_size)
            old = seconds[segment.partition]
            if old is None or new is None:
                seconds[segment.partition] = None
            else:
                seconds[segment.partition] = (old[0] + new[0], old[1] + new[1])
    return seconds


# --- files ------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Any]:
    """The contents of a measurement file; empty if it is missing or invalid."""
    try:
        contents = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(contents, dict) or contents.get("format") != _FORMAT:
        return {}
    devices = contents.get("devices")
    return devices if isinstance(devices, dict) else {}


def _is_machine(entry: Any) -> bool:
    """Whether an entry of a file, of any JSON type, is a valid machine."""
    faults: list[str] = []
    if isinstance(entry, dict):
        check_machine(entry, faults)
    return isinstance(entry, dict) and not faults


def _are_pairs(entry: Any, count: int) -> bool:
    """Whether an entry of a file holds the times of `count` units; None marks unmeasured units."""
    return (
        isinstance(entry, list)
        and len(entry) == count
        and all(
            pair is None
            or (isinstance(pair, list) and len(pair) == 2 and all(map(_are_seconds, pair)))
            for pair in entry
        )
    )


def _are_seconds(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def _write(path: Path, devices: dict[str, Any]) -> None:
    """Replaces the file atomically, so that others never read part of it; warns if it cannot."""
    text = json.dumps({"format": _FORMAT, "devices": devices}, indent=1, sort_keys=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8"
        ) as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(
            "What was measured cannot be kept, and is measured again the next time: writing "
            f"{path} failed ({error}). Set XDG_CACHE_HOME to a directory that can be written.",
            stacklevel=3,
        )
