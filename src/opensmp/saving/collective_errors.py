"""Propagates errors so that all processes raise, or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow as tf

from opensmp.distributed.collectives import objects
from opensmp.errors import CheckpointError, SavingError
from opensmp.saving.atomic import advice

DAMAGED = "damaged"
OTHER = "other"
# TensorFlow errors that do not indicate damaged files.
_NO_DAMAGE = (
    tf.errors.PermissionDeniedError,
    tf.errors.ResourceExhaustedError,
    tf.errors.UnavailableError,
    tf.errors.CancelledError,
    tf.errors.AbortedError,
    tf.errors.DeadlineExceededError,
)


class DamagedError(CheckpointError):
    """The files of a checkpoint are damaged; nothing was restored."""


class RankResult(NamedTuple):
    """Result of an operation in one process, to be gathered by all.

    Attributes:
        value: The result for the other processes; must be picklable.
        error: The error message; None on success.
        kind: `DAMAGED` if files are damaged, otherwise `OTHER`.
    """

    value: Any = None
    error: str | None = None
    kind: str = OTHER


def result_of_error(error: BaseException, directory: str | None = None) -> RankResult:
    """Converts an exception to an outcome; `directory` is the write target, for advice."""
    text = str(error)
    if isinstance(error, tf.errors.OpError):
        text = f"{type(error).__name__}: {error.message}"
    elif not isinstance(error, (CheckpointError, SavingError)):
        text = f"{type(error).__name__}: {error}"
    if directory is not None and isinstance(error, (OSError, tf.errors.OpError)):
        text = f"{text.rstrip('.')}. {_advice(error, Path(directory))}"
    # TensorFlow's readers raise various OpErrors, including the base class, for damaged files.
    of_files = isinstance(error, tf.errors.OpError) and not isinstance(error, _NO_DAMAGE)
    damaged = of_files or isinstance(error, DamagedError)
    return RankResult(error=text, kind=DAMAGED if damaged else OTHER)


def attempt(work: Callable[[], Any], directory: str | None = None) -> RankResult:
    """The outcome of `work`; even a warning raised as an error is one, since other ranks wait."""
    try:
        return RankResult(work())
    except Exception as error:
        return result_of_error(error, directory)


def _advice(error: Exception, directory: Path) -> str:
    for path in (directory, *directory.parents):
        if path.exists() and not path.is_dir():
            return f"{path} is a file; expected a directory, or nothing, of this name."
    return advice(error, directory)


def gathered(outcome: RankResult, ranks: Sequence[int], what: str) -> list[RankResult]:
    """All-gathers the outcomes of all processes, in the order of ranks."""
    return objects.allgather_objects(outcome, ranks, what)


def first_error(outcomes: Sequence[RankResult]) -> str | None:
    """Combines the errors of all processes into one message; None if there are none."""
    failed = {rank: o.error for rank, o in enumerate(outcomes) if o.error is not None}
    if not failed:
        return None
    if len(outcomes) == 1 or len(set(failed.values())) == 1 < len(failed):
        return next(iter(failed.values()))
    return "\n".join(f"rank {rank}: {text}" for rank, text in failed.items())
