"""Times functions on a real device, under the conditions of a step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from opensmp.base.types import ConcreteFunction, Tensor
from opensmp.compiler.lowering.program import Program
from opensmp.compiler.lowering.segments import Segment
from opensmp.compiler.trace.trace import TracedGraph
from opensmp.execution.emission.emit_call import emit_call

Pick = Callable[[list[float]], float]
Clock = Callable[[], float]

_REPEATS = 5
_MOST_CALLS = 32
_LONG_SECONDS = 0.02


def seconds_of(
    run: Callable[[], Any],
    repeats: int = _REPEATS,
    pick: Pick = statistics.median,
    clock: Clock = time.perf_counter,
) -> float:
    """Time of `run()`, with all devices idle before and after, without two warm-up runs.

    `pick` aggregates the times: `statistics.median`, or `min` for the time on an idle device.
    `clock` may be `time.process_time` for one thread on a busy machine.
    """
    times = []
    for index in range(repeats + 2):
        tf.test.experimental.sync_devices()
        start = clock()
        run()
        tf.test.experimental.sync_devices()
        if index >= 2:
            times.append(clock() - start)
    return pick(times)


def seconds_per_call(
    function: ConcreteFunction,
    args: Sequence[Tensor],
    repeats: int = _REPEATS,
    clock: Clock = time.perf_counter,
    pick: Pick = statistics.median,
) -> float:
    """Time of one call of a function inside a larger function, with calls one after another.

    Excludes Python's overhead of starting the larger function: for a short function, the minimum
    time of one call is subtracted from the minimum time of several, up to 33 for a very short one.
    The two measurements alternate, so that a temporary load slows down both. If noise hides the
    difference, the longer run's time divided by its number of calls is returned, so the result is
    never zero.
    """
    once = _calls(function, args, 1)
    seconds = seconds_of(lambda: once(*args), repeats, pick, clock)
    if seconds > _LONG_SECONDS:
        return seconds
    more = max(1, min(_MOST_CALLS, int(_LONG_SECONDS / max(seconds, 1e-9))))
    often = _calls(function, args, 1 + more)
    few = many = float("inf")
    for _ in range(repeats):
        few = min(few, seconds_of(lambda: once(*args), 2, min, clock))
        many = min(many, seconds_of(lambda: often(*args), 2, min, clock))
    return (many - few) / more if many > few else many / (1 + more)


def _calls(function: ConcreteFunction, args: Sequence[Tensor], times: int) -> ConcreteFunction:
    def body(*args: Tensor) -> list[Tensor]:
        everything: list[Tensor] = []  # TensorFlow prunes operations whose results are not used
        before: list[Any] = []
        for index in range(times):
            with tf.control_dependencies(before):
                op, results = emit_call(function, args, f"call_{index}")
            everything += results
            before = [op]
        return everything

    specs = [tf.TensorSpec(t.shape, t.dtype) for t in args]
    return tf.function(body, autograph=False).get_concrete_function(*specs)


def segment_seconds(
    program: Program,
    segment: Segment,
    *,
    unknown_size: int,
    repeats: int = _REPEATS,
    clock: Clock = time.perf_counter,
    pick: Pick = statistics.median,
) -> tuple[float, float] | None:
    """Times of a segment's forward and backward pass on the current device, in seconds.

    Inputs and variables are random; their memory is allocated for the measurement. Returns None for
    a segment that reads handles, which cannot be made up.
    """
    forward = program.forward(segment)
    if any(t.dtype in (tf.variant, tf.resource) for t in forward.feeds):
        return None
    random = np.random.default_rng(0)
    values = {id(t): _sample(t, random, unknown_size) for t in forward.feeds}
    args = [values[id(t)] for t in forward.feeds]
    seconds = seconds_per_call(forward.function, args, repeats, clock, pick)
    made = (*forward.outputs, *forward.residuals)
    values.update({id(t): value for t, value in zip(made, forward.function(*args), strict=True)})
    backward = program.backward(segment, _differentiated(program.traced, segment))
    if backward is None:
        return seconds, 0.0
    for output, upstream in zip(backward.gradient.outputs, backward.gradient.upstream, strict=True):
        if output.dtype == tf.variant:
            return None
        values[id(upstream)] = tf.ones_like(values[id(output)])
    again, recomputing = backward.recompute, 0.0
    if again is not None:
        feeds = [values[id(t)] for t in again.feeds]
        recomputing = seconds_per_call(again.function, feeds, repeats, clock, pick)
        values.update(zip(map(id, again.fetches), again.function(*feeds), strict=True))
    feeds = [values[id(t)] for t in backward.feeds]
    alone = seconds_per_call(backward.function, feeds, repeats, clock, pick)
    return seconds, recomputing + alone


def _differentiated(traced: TracedGraph, segment: Segment) -> list[Tensor]:
    """Outputs that a loss may depend on: all except the new state of variables."""
    state = {id(value) for _, value in traced.updates}
    return [t for t in segment.outputs if id(t) not in state]


def _sample(tensor: Tensor, random: np.random.Generator, unknown_size: int) -> Tensor:
    """Positive floats, for which roots and logarithms exist; zeros for integers; True for bools."""
    rank = tensor.shape.rank or 0
    dimensions = tensor.shape.as_list() if rank else []
    shape = [unknown_size if size is None else size for size in dimensions]
    if tensor.dtype.is_floating or tensor.dtype.is_complex:
        values = random.random(shape, dtype=np.float32) * np.float32(0.9) + np.float32(0.1)
        return tf.cast(values, tensor.dtype)
    return tf.ones(shape, tf.bool) if tensor.dtype == tf.bool else tf.zeros(shape, tensor.dtype)
