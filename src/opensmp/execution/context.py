"""The step that is being traced on this thread, for the models that it calls."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.trace.trace import TracedGraph


class Prepared(NamedTuple):
    """A model made ready for calls with such arguments.

    Attributes:
        traced: The traced model.
        plan: Its plan.
        homes: Id of each of its variables to the partition it lives in.
    """

    traced: TracedGraph
    plan: Plan
    homes: Mapping[int, int]


Prepare = Callable[[tuple[Any, ...], Mapping[str, Any]], Prepared]

_local = threading.local()


class Runner(Protocol):
    """What runs the model calls of a step."""

    @property
    def num_microbatches(self) -> int:
        """Into how many microbatches a batch is divided."""

    def run(
        self, model: Any, prepare: Prepare, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, list[Any]]:
        """Runs one call; gives the output and the losses that layers added."""


def current_runner() -> Runner | None:
    """What runs the models of the step that is being traced, None outside of steps."""
    return getattr(_local, "runner", None)


@contextlib.contextmanager
def as_current(runner: Runner) -> Iterator[None]:
    """Makes this the current runner."""
    outer, _local.runner = current_runner(), runner
    try:
        yield
    finally:
        _local.runner = outer
