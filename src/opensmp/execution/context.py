"""The runner of the step that is being traced on the current thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.trace.trace import TracedGraph


class Prepared(NamedTuple):
    """A model that is traced and planned for a call signature.

    Attributes:
        traced: The traced model.
        plan: Its plan.
        homes: Maps the id of each variable to the partition that holds it.
    """

    traced: TracedGraph
    plan: Plan
    homes: Mapping[int, int]


Prepare = Callable[[tuple[Any, ...], Mapping[str, Any]], Prepared]

_local = threading.local()


class Runner(Protocol):
    """Runs the model calls of a step."""

    @property
    def num_microbatches(self) -> int:
        """Number of microbatches per batch."""

    def run(
        self, model: Any, prepare: Prepare, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, list[Any]]:
        """Runs one call; returns the output and the losses that layers added."""


def current_runner() -> Runner | None:
    """The runner of the step that is being traced on this thread; None outside of steps."""
    return getattr(_local, "runner", None)


@contextlib.contextmanager
def as_current(runner: Runner) -> Iterator[None]:
    """Makes `runner` the current runner within the context."""
    outer, _local.runner = current_runner(), runner
    try:
        yield
    finally:
        _local.runner = outer
