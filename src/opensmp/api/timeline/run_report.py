"""`smp.RunReport`: writes what a run does into a folder, for `opensmp report`."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from opensmp.api.step.step_output import StepOutput
from opensmp.api.timeline.run_recording import RunRecording
from opensmp.base.message_text import numbered, shown
from opensmp.distributed import world
from opensmp.errors import StepError
from opensmp.training.callbacks.watcher import Watcher
from opensmp.training.step_functions import StepFunction

_MOST_STEPS = 100


class _Count(NamedTuple):
    """Batches that a model has trained, their rows if they are known, and traces of the step."""

    batches: int
    rows: int | None
    traces: int


class RunReport(Watcher):
    """Writes measurements of a training run into a folder; `opensmp report` makes a page of them.

    In `fit` it is a callback. In a loop of your own, call `step` after each training step. It
    writes losses, times of steps, examples per second, the plan, the peak memory of each partition,
    the configuration, and the timeline of a few steps, from the third one on. For these the step is
    traced once more, as by `smp.record_timeline`, which takes as long as the first trace.

    With several processes all ranks make and use it; each writes a file of its own. Files are only
    appended to, so that a run that is killed leaves what it has measured. Another run in the same
    folder has other files. If the folder cannot be written any more while training runs, a warning
    says so, and training goes on. In several processes `step` does not wait for other ranks, apart
    from the first one.

    Args:
        folder: Folder to write to; it is created if missing.
        timeline_steps: How many steps to measure for the timeline, 0 to 100. Of several, the first
            is not shown, because TensorFlow prepares its run in it.
        tensorboard: Whether to write the same numbers for TensorBoard, into the folder
            `tensorboard` in the folder, and the timeline as a trace for https://ui.perfetto.dev.

    Raises:
        StepError: An argument is wrong; the message lists all.
        NotInitializedError: It is used before `smp.init`.
        SavingError: The folder cannot be written when the run begins.

    Example:
        ```python
        model.fit(images, labels, callbacks=[smp.RunReport("runs/a")])

        with smp.RunReport("runs/b") as report:
            for images, labels in batches:
                loss = train_step(images, labels)
                report.step(loss=loss, examples=len(images))
        ```
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        timeline_steps: int = 3,
        tensorboard: bool = False,
    ) -> None:
        super().__init__()
        faults = []
        if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder):
            faults.append(f"folder: expected the path of a folder; received {shown(folder)}")
        elif "://" in str(folder):
            faults.append(f"folder: expected one of a local disk; received {shown(folder)}")
        is_count = isinstance(timeline_steps, int) and not isinstance(timeline_steps, bool)
        if not is_count or not 0 <= timeline_steps <= _MOST_STEPS:
            faults.append(
                f"timeline_steps: expected an integer from 0 to {_MOST_STEPS}; received "
                f"{shown(timeline_steps)}"
            )
        if not isinstance(tensorboard, bool):
            faults.append(f"tensorboard: expected True or False; received {shown(tensorboard)}")
        if faults:
            raise StepError("\n".join(["smp.RunReport: wrong arguments.", *numbered(faults)]))
        self._folder = Path(folder)
        self._timeline_steps, self._tensorboard = timeline_steps, tensorboard
        self._recording: RunRecording | None = None
        self._since = 0.0
        self._before = _Count(0, 0, 0)

    # --- in a loop --------------------------------------------------------------------------

    def step(self, *, examples: int | None = None, **values: Any) -> None:
        """Takes note of a training step that has just run.

        Its time is that since the last call, or since the `with` block was entered.

        Args:
            examples: Rows of the batch, of all replicas together; for examples per second.
            **values: Numbers to show, such as `loss=loss`: scalars of Python, NumPy or TensorFlow.
                Waits for those that are still being computed.

        Raises:
            StepError: A value is not a number; the message lists all.
            NotInitializedError: Without `smp.init`.

        Example:
            ```python
            report.step(loss=loss, examples=len(images))
            ```
        """
        found, faults = _numbers(values)
        if examples is not None:
            rows = isinstance(examples, (int, np.integer)) and not isinstance(examples, bool)
            if not rows or examples < 0:
                faults.append(f"examples: expected an integer from 0; received {shown(examples)}")
        if faults:
            raise StepError("\n".join(["RunReport.step: wrong arguments.", *numbered(faults)]))
        recording = self._current()
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        recording.after_steps(1, seconds, None if examples is None else int(examples), found)
        recording.before_step()
        self._since = time.perf_counter()

    def close(self) -> None:
        """Takes note that training has ended, and writes what is not written yet.

        `step` may be called again after it.
        """
        if self._recording is not None:
            self._recording.end(None)

    def __enter__(self) -> RunReport:
        self._current()
        self._since = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._recording is not None:
            self._recording.end(error)

    def _current(self) -> RunRecording:
        """The recording in the current world, which begins with its first use."""
        here = world.current("smp.RunReport")
        if self._recording is None or self._recording.world is not here:
            if self._recording is not None:  # smp.init was called again
                self._recording.stop_listening()
            self._recording = RunRecording(
                self._folder, here, self._timeline_steps, self._tensorboard
            )
            self._since = time.perf_counter()
        return self._recording

    # --- as a callback ----------------------------------------------------------------------

    def on_train_begin(self, logs: Any = None) -> None:
        """Begins, or goes on with, the run."""
        self._current()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Measures the step if it is one of those to record."""
        self._before = self._count()
        self._current().before_step()
        self._since = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Takes note of the steps that have run."""
        seconds = time.perf_counter() - self._since
        recording = self._current()
        recording.stop_listening()
        before, now = self._before, self._count()
        steps, examples = 1, None
        if isinstance(getattr(self.model, "train_function", None), StepFunction):
            steps = now.batches - before.batches
            if now.rows is not None and before.rows is not None:
                examples = now.rows - before.rows
        if steps > 0:  # none of a run that goes on where another one ended
            values = _numbers(logs or {})[0]
            recording.after_steps(steps, seconds, examples, values, now.traces != before.traces)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Takes note of the epoch's losses and metrics."""
        self._current().end_epoch(epoch, _numbers(logs or {})[0])

    def on_train_end(self, logs: Any = None) -> None:
        """Takes note of the end."""
        self._current().end(None)

    def on_train_error(self, error: BaseException) -> None:
        """Takes note of an error that ended `fit`."""
        if self._recording is not None:
            self._recording.end(error)

    def _count(self) -> _Count:
        function = getattr(self.model, "train_function", None)
        if isinstance(function, StepFunction):
            return _Count(function.batches, function.rows, function.tracing_count)
        return _Count(0, None, 0)


def _numbers(values: Mapping[str, Any]) -> tuple[dict[str, float], list[str]]:
    """Returns the values as numbers, and the faults of those that are none."""
    found: dict[str, float] = {}
    faults = []
    for name, value in values.items():
        if isinstance(value, StepOutput):
            faults.append(
                f"{name}: expected a number; received a StepOutput with a value for each "
                f"microbatch. Give {name}={name}.reduce_mean()"
            )
            continue
        try:
            array = np.asarray(value, dtype=np.float64)
            if array.size != 1:
                raise ValueError
            found[name] = float(array.reshape(()))
        except Exception:  # what a foreign value raises
            faults.append(f"{name}: expected a number; received {shown(value)}")
    return found, faults
