"""Runs of traced functions in which ranks need each other, noted while they last.

What a function calls eagerly is noted when it is called; inside of a `tf.function` nobody could
tell a rank that waits for ever from one that computes. So the first call of a graph that needs
others adds two operations to it: one that notes when a run begins, and one that notes its end,
after all such calls. Runs are counted by the function's name and by what it calls, so that ranks
that run functions with other calls are found, each waiting for the other. Calls in branches and
bodies of loops are not noted: what notes the end would not run there.
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
from opensmp.distributed.watchdog import recovery
from opensmp.distributed.watchdog.call_log import Wait, waits

Op = Any

_RUNS = "_smp_function_runs"
_NUM_SHOWN = 2


class FunctionRuns:
    """The runs of one graph with calls of one group.

    Args:
        function: Name of the function.
        ranks: All that take part, ascending.
    """

    def __init__(self, function: str, ranks: tuple[int, ...]) -> None:
        self._function, self._ranks = function, ranks
        self._calls: list[str] = []
        self._open: deque[Wait] = deque()
        recovery.interruptible.add(self)

    def add(self, call: str) -> None:
        """Notes a call of the function, in words that are the same on all ranks."""
        self._calls.append(call)

    # Asked for when a function runs, so that all its calls are there.

    @functools.cached_property
    def name(self) -> str:
        """What a run is, in the words of the user."""
        calls = sorted(self._calls)  # ranks may make them in another order
        more = len(calls) - _NUM_SHOWN
        rest = f" and {more} more calls" if more > 0 else ""
        return f"the function {self._function} with {'; '.join(calls[:_NUM_SHOWN])}{rest}"

    @functools.cached_property
    def lane(self) -> str:
        """Tells runs of it from those of others."""
        digest = hashlib.blake2b(repr(sorted(self._calls)).encode(), digest_size=8).hexdigest()
        return f"runs of {self._function} {digest}"

    def begin(self, _: Any) -> Any:
        """Notes that a run begins."""
        recovery.begin_run()
        self._open.append(waits.enter(self.name, self._ranks, self.lane, computes=True))
        return np.int64(0)

    def end(self, _: Any) -> Any:
        """Notes that a run has ended."""
        waits.leave(self._open.popleft())
        return np.int64(0)

    def interrupt(self) -> None:
        """See `recovery.Interruptible`: nothing waits here."""

    def restart(self, generation: int) -> None:
        """See `recovery.Interruptible`."""
        self._open.clear()


@contextlib.contextmanager
def noted(call: str, ranks: tuple[int, ...], host: str) -> Iterator[list[Op]]:
    """Context in which a function that is being traced gets operations that need other ranks.

    Args:
        call: What they are for, the same on all ranks.
        ranks: All that take part, ascending.
        host: The device of the operations that note.

    Yields:
        A list, to which those are added that wait for others.
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
        # Dependencies of the user's code are none of these. Nor are they stateful: TensorFlow
        # would put the end before all that the user's code does behind it.
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
    """A tensor that functions take as an argument, since it is too large to be put into them.

    What depends on constants alone, and has no effects that TensorFlow knows of, is computed
    once, when a function is made.

    Args:
        host: Its device.
    """
    with tf.init_scope(), tf.device(host):
        return tf.zeros([129], tf.int8)
