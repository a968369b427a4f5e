"""Calls of `fit` that resume the training of an earlier program.

Serves `smp.CheckpointOnPreemption`, and Keras' BackupAndRestore, whose weights file is extended by
what Keras omits: seeds, the batch within the epoch, metrics and the counters of callbacks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras

from opensmp import _private
from opensmp.base.types import Model
from opensmp.saving.models import resume_state
from opensmp.training.callbacks.callbacks import flat
from opensmp.training.resume.preemption import CheckpointOnPreemption
from opensmp.training.resume.progress import Progress, noted, seeds_of
from opensmp.training.sync.sync import is_shared, meet

Logs = Any

_BACKUP = keras.callbacks.BackupAndRestore


class _Before(keras.callbacks.Callback):
    """First callback in the list: updates the progress, so that the others can save it."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        self._progress.begin_epoch(epoch)

    def on_test_begin(self, logs: Logs = None) -> None:
        self._progress.begin_test()

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        self._progress.end_epoch(epoch)


class _After(keras.callbacks.Callback):
    """Runs after BackupAndRestore has loaded its file: reads the progress stored next to it."""

    def __init__(self, progress: Progress, paths: Sequence[str]) -> None:
        super().__init__()
        self._progress, self._paths = progress, paths

    def on_train_begin(self, logs: Logs = None) -> None:
        for path in self._paths:
            text = meet("look for a backup", resume_state.read(path))[0]
            if text is not None:
                self._progress.resume(text, path)


def is_resumable(arguments: Any) -> bool:
    """Whether the arguments of a `fit` call contain a callback that resumes training."""
    return any(
        isinstance(each, (_BACKUP, CheckpointOnPreemption))
        for each in flat(arguments.get("callbacks"))
    )


@contextlib.contextmanager
def resumable(model: Model, given: Any, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Context of a call of `fit` that resumes an earlier program's training."""
    known = flat(given.get("callbacks"))
    first, last = given.get("initial_epoch", 0), given.get("epochs", 1)
    progress = Progress(model, known, int(first), int(last))
    paths = [_private.backup_path(each) for each in known if isinstance(each, _BACKUP)]
    callbacks = flat(arguments.get("callbacks"))
    ends = [each for each in callbacks if isinstance(each, CheckpointOnPreemption)]
    rest = [each for each in callbacks if not isinstance(each, CheckpointOnPreemption)]
    ordered = [_Before(progress), *rest, _After(progress, paths), *ends]

    def state() -> bytes:
        return progress.state(_best_weights(known), seeds_of(model))

    with noted(model, progress), resume_state.written(model, paths, state):
        yield {**arguments, "callbacks": ordered}


def _best_weights(callbacks: Sequence[Any]) -> list[Any] | None:
    """The weights that an EarlyStopping keeps; None with several processes, which have parts."""
    kept = [getattr(each, "best_weights", None) for each in callbacks]
    return None if is_shared() else next((w for w in kept if w is not None), None)
