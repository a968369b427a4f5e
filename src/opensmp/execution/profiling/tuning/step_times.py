"""Measures the training steps of a script, whatever calls them, and ends it after a few."""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from opensmp.distributed import world
from opensmp.distributed.collectives.objects import allgather_objects, meet
from opensmp.distributed.world import World
from opensmp.execution.context import Prepared
from opensmp.execution.profiling.advice import warn_of_one_microbatch
from opensmp.execution.profiling.tuning.candidates import Ranked, TrainedCall, rank
from opensmp.execution.profiling.tuning.trial import WARM_STEPS, Measured, Trial


class _Clock:
    """Times of the calls of those `tf.function`s in which a training step was traced."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self._starts: list[tuple[Any, list[float]]] = []  # the function is kept: ids are reused
        self._waits = bool(tf.config.list_logical_devices("GPU"))
        self.trained: TrainedCall | None = None
        self.graphs: list[Any] = []

    def call(self, function: Any, work: Callable[[], Any]) -> Any:
        began, known = time.perf_counter(), len(self.graphs)
        result = work()
        if self._waits:
            tf.test.experimental.sync_devices()
        starts = self._starts_of(function, len(self.graphs) > known)
        if starts is not None:
            starts.append(began)
            if len(starts) > self._trial.steps + WARM_STEPS:
                self._finish(starts)
        return result

    def _starts_of(self, function: Any, has_traced: bool) -> list[float] | None:
        for known, starts in self._starts:
            if known is function:
                return starts
        graph = getattr(function, "graph", None)  # of a concrete function
        if not has_traced and not any(graph is each for each in self.graphs):
            return None
        self._starts.append((function, []))
        return self._starts[-1][1]

    def _finish(self, starts: Sequence[float]) -> None:
        """Tells the times, and ends this process, with those of all other ranks."""
        here = world.current("opensmp tune")
        ends = zip(starts[WARM_STEPS - 1 :], starts[WARM_STEPS:], strict=False)
        own = statistics.median(end - start for start, end in ends)
        seconds = max(allgather_objects(own, range(here.size), "opensmp tune"))
        if here.rank == 0:
            self._measured(here, seconds).write(self._trial.result)
        meet(range(here.size), "opensmp tune")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # no more of the script: it might save what was trained for a few steps

    def _measured(self, here: World, seconds: float) -> Measured:
        config, trained = here.config, self.trained
        ranked = Ranked([])
        if self._trial.candidates and trained is not None:
            ranked = rank(config, trained, self._trial.candidates, self._trial.changes)
        return Measured(
            seconds,
            config.to_dict(),
            sorted(config.given),
            here.size,
            None if trained is None else trained.rows,
            *ranked,
        )


_clock: _Clock | None = None
_heard: list[TrainedCall] | None = None


@contextlib.contextmanager
def trained_calls() -> Iterator[list[TrainedCall]]:
    """Context that lists, of each training step that is traced in it, the largest call."""
    global _heard
    found: list[TrainedCall] = []
    _heard = found
    try:
        yield found
    finally:
        _heard = None


def start(trial: Trial | None) -> None:
    """Begins to measure, if there is a trial."""
    global _clock
    if trial is not None and _clock is None:
        _clock = _Clock(trial)


def call(function: Any, work: Callable[[], Any]) -> Any:
    """Makes an eager call of a `tf.function`, which may be a training step."""
    return work() if _clock is None else _clock.call(function, work)


def training_was_traced(here: World, calls: Sequence[Prepared]) -> None:
    """Notes a training step that was just traced, and warns of one that has no pipeline."""
    warn_of_one_microbatch(here, calls)
    if (_clock is None and _heard is None) or not calls:
        return
    found = TrainedCall.of(calls, here.config.microbatches)
    if _heard is not None:
        _heard.append(found)
    if _clock is None:
        return
    largest = _clock.trained
    if largest is None or _size(found) >= _size(largest):
        _clock.trained = found
    graph = tf.compat.v1.get_default_graph()
    _clock.graphs.append(graph)


def _size(trained: TrainedCall) -> int:
    return len(trained.call.traced.operations)
