"""Logs runs of traced functions in which ranks need each other.

Eager calls are logged when made; inside a `tf.function` a rank that waits forever would look like
one that computes. So the first collective call in a graph adds two operations to it: one logs the
begin of a run, the other its end, after all such calls. Runs are counted by the function's name and
its collective calls, so that ranks that run functions with different calls are detected as waiting
for each other. Calls in branches and loop bodies are not logged: the operation that logs the end
would not run there.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Op
from opensmp.distributed.watchdog import recovery
from opensmp.distributed.watchdog.call_log import Wait, waits

_RUNS = "_smp_function_runs"
_NUM_SHOWN = 2


class FunctionRuns:
    """The runs of one graph with calls of one group."""

    def __init__(self, function: str, ranks: tuple[int, ...]) -> None:
        self._function, self._ranks = function, ranks
        self._calls: list[str] = []
        self._open: deque[Wait] = deque()
        recovery.interruptible.add(self)

    def add(self, call: str) -> None:
        """Adds a call of the function, named the same on all ranks."""
        self._calls.append(call)

    # Computed when the function first runs, when all its calls are known.

    @functools.cached_property
    def name(self) -> str:
        """Name of a run, in the user's terms."""
        calls = sorted(self._calls)  # their order may differ between ranks
        more = len(calls) - _NUM_SHOWN
        rest = f" and {more} more calls" if more > 0 else ""
        return f"the function {self._function} with {'; '.join(calls[:_NUM_SHOWN])}{rest}"

    @functools.cached_property
    def lane(self) -> str:
        """Lane that separates its runs from those of other functions."""
        digest = hashlib.blake2b(repr(sorted(self._calls)).encode(), digest_size=8).hexdigest()
        return f"runs of {self._function} {digest}"

    def begin(self, _: Any) -> Any:
        """Logs the begin of a run."""
        recovery.begin_run()
        self._open.append(waits.enter(self.name, self._ranks, self.lane, computes=True))
        return np.int64(0)

    def end(self, _: Any) -> Any:
        """Logs the end of a run."""
        waits.leave(self._open.popleft())
        return np.int64(0)

    def interrupt(self) -> None:
        """See `recovery.Interruptible`: nothing waits here."""

    def restart(self, generation: int) -> None:
        """See `recovery.Interruptible`."""
        self._open.clear()


@contextlib.contextmanager
def noted(call: str, ranks: tuple[int, ...], host: str) -> Iterator[list[Op]]:
    """Context that logs operations that need other ranks, in the function being traced.

    The caller adds the operations that wait for others to the list that it yields.
    """
    graph = tf.compat.v1.get_default_graph()
    if not _private.is_of_function(graph):
        yield []
        return
    if not hasattr(graph, _RUNS):
        setattr(graph, _RUNS, {})
    known: dict[tuple[int, ...], tuple[FunctionRuns, Op, Op]] = getattr(graph, _RUNS)
    if ranks not in known:
        runs = FunctionRuns(graph.name, ranks)
        # The control dependencies of the user's code must not apply. The operations are stateless:
        # TensorFlow would otherwise order the end before all later stateful operations.
        with tf.control_dependencies(None), tf.device(host):
            begin = _private.host_call(runs.begin, [not_constant(host)], tf.int64, stateful=False)
            end = _private.host_call(runs.end, [begin], tf.int64, stateful=False)
        _private.must_run(graph, [begin.op, end.op])
        known[ranks] = runs, begin.op, end.op
    runs, begin_op, end_op = known[ranks]
    runs.add(call)
    recovery.touch()
    waiting: list[Op] = []
    with tf.control_dependencies([begin_op]):
        yield waiting
    for op in waiting:
        _private.add_control_input(end_op, op)


@functools.cache
def not_constant(host: str) -> Any:
    """A tensor that functions capture as an argument, because it is too large to be inlined.

    TensorFlow evaluates stateless operations on constants only once, when a function is made.
    """
    with tf.init_scope(), tf.device(host):
        return tf.zeros([129], tf.int8)
