"""The runner of the step that is being traced on the current thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from opensmp.base.thread_values import ThreadValue
from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.trace.trace import TracedGraph


class Prepared(NamedTuple):
    """A model, traced and planned for a call signature.

    Attributes:
        traced: The trace of the call.
        plan: Its plan.
        homes: Maps variable ids to partitions.
        trace_rows: Traces the same call with another number of rows; None if that cannot be done.
    """

    traced: TracedGraph
    plan: Plan
    homes: Mapping[int, int]
    trace_rows: Callable[[int], TracedGraph] | None = None


Prepare = Callable[[tuple[Any, ...], Mapping[str, Any]], Prepared]


class Runner(Protocol):
    """Runs the model calls of a step."""

    @property
    def num_microbatches(self) -> int:
        """Number of microbatches per batch."""

    def run(
        self, model: Any, prepare: Prepare, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, list[Any]]:
        """Runs one call; returns the output and the losses that layers added."""


_runner: ThreadValue[Runner | None] = ThreadValue(None)


def current_runner() -> Runner | None:
    """The runner of the step that is being traced on this thread; None outside of steps."""
    return _runner.get()


def as_current(runner: Runner) -> AbstractContextManager[None]:
    """Makes `runner` the current runner within the context."""
    return _runner.set_to(runner)
