"""What all processes know of the errors of each: one error in all of them, or none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow as tf

from opensmp.distributed.collectives import objects
from opensmp.errors import CheckpointError, SavingError
from opensmp.saving.atomic import advice

DAMAGED = "damaged"
OTHER = "other"
# Errors of TensorFlow that say nothing of what the files contain.
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


class Outcome(NamedTuple):
    """How it went in a process.

    Attributes:
        value: What it has to tell the others.
        error: The message of its error, None if there was none.
        kind: Whether the files are damaged, or something else is wrong.
    """

    value: Any = None
    error: str | None = None
    kind: str = OTHER


def outcome_of(error: BaseException, directory: str | None = None) -> Outcome:
    """The outcome of something that has raised an error.

    Args:
        error: The error.
        directory: Where it was to write, for what the message says about that.
    """
    text = str(error)
    if isinstance(error, tf.errors.OpError):
        text = f"{type(error).__name__}: {error.message}"
    elif not isinstance(error, (CheckpointError, SavingError)):
        text = f"{type(error).__name__}: {error}"
    if directory is not None and isinstance(error, (OSError, tf.errors.OpError)):
        text = f"{text.rstrip('.')}. {_advice(error, Path(directory))}"
    # TensorFlow's readers raise errors of many classes, and their base class, for what is damaged.
    of_files = isinstance(error, tf.errors.OpError) and not isinstance(error, _NO_DAMAGE)
    damaged = of_files or isinstance(error, DamagedError)
    return Outcome(error=text, kind=DAMAGED if damaged else OTHER)


def _advice(error: Exception, directory: Path) -> str:
    for path in (directory, *directory.parents):
        if path.exists() and not path.is_dir():
            return f"{path} is a file; expected a directory, or nothing, of this name."
    return advice(error, directory)


def gathered(outcome: Outcome, ranks: Sequence[int], what: str) -> list[Outcome]:
    """The outcomes of all processes, by rank."""
    return objects.allgather_objects(outcome, ranks, what)


def first_error(outcomes: Sequence[Outcome]) -> str | None:
    """One message for all errors; None if there are none."""
    failed = {rank: o.error for rank, o in enumerate(outcomes) if o.error is not None}
    if not failed:
        return None
    if len(outcomes) == 1 or len(set(failed.values())) == 1 < len(failed):
        return next(iter(failed.values()))
    return "\n".join(f"rank {rank}: {text}" for rank, text in failed.items())
