"""Reads and writes TensorFlow's state file `checkpoint`, which lists a directory's checkpoints.

Its contents are not trusted: only base names are used, and looked up in the directory of the file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf
from google.protobuf import text_format

from opensmp.saving.atomic import to_disk

STATE = "checkpoint"  # the name that tf.train.latest_checkpoint looks for
_LARGEST_BYTES = 1 << 26  # half a million checkpoints


class State(NamedTuple):
    """Contents of a state file.

    Attributes:
        names: Base names of the checkpoints, oldest first.
        times: When each was saved, in seconds since 1970; empty if unknown.
        last_preserved: Time of the newest checkpoint preserved by `keep_checkpoint_every_n_hours`,
            or the start of that interval.
    """

    names: tuple[str, ...]
    times: tuple[float, ...]
    last_preserved: float


class StateFileError(ValueError):
    """A state file is damaged; the message says how."""


def state_path(directory: str) -> str:
    """Path of the state file."""
    return os.path.join(directory, STATE)


def read_state(directory: str) -> State | None:
    """Reads the state file of a directory; None if there is none."""
    try:
        with open(state_path(directory), "rb") as file:
            content = file.read(_LARGEST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StateFileError(f"it cannot be read: {error.strerror or error}") from error
    if len(content) > _LARGEST_BYTES:
        raise StateFileError(f"it has more than {_LARGEST_BYTES} bytes")
    if not content.strip():
        raise StateFileError("it is empty")
    message = _message()
    try:
        text_format.Parse(content.decode(), message)
    except (text_format.ParseError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise StateFileError(f"it is no list of checkpoints: {str(error)[:120]}") from error
    paths, times = list(message.all_model_checkpoint_paths), message.all_model_checkpoint_timestamps
    if not paths or paths[-1] != message.model_checkpoint_path:
        raise StateFileError("the newest checkpoint is not the last one of all")
    if times and len(times) != len(paths):
        raise StateFileError(f"it has {len(paths)} checkpoints and {len(times)} times")
    if not all(math.isfinite(time) for time in (*times, message.last_preserved_timestamp)):
        raise StateFileError("it has times that are not finite")
    names = tuple(os.path.basename(path) for path in paths)
    return State(names, tuple(times), float(message.last_preserved_timestamp))


def write_state(directory: str, state: State, scratch: str) -> None:
    """Writes a state file atomically: first to `scratch`, a directory of the same file system."""
    message = _message(state)
    new = os.path.join(scratch, STATE)
    with open(new, "w", encoding="utf-8") as file:
        file.write(text_format.MessageToString(message, as_utf8=False))
    to_disk(new)
    os.replace(new, state_path(directory))


def _message(state: State | None = None) -> Any:
    """TensorFlow's protocol buffer message for a state; empty without one."""
    names: Sequence[str] = ("x",) if state is None else state.names
    message = tf.compat.v1.train.generate_checkpoint_state_proto(
        os.sep,  # keeps names as they are
        names[-1],
        all_model_checkpoint_paths=list(names),
        all_model_checkpoint_timestamps=[] if state is None else list(state.times),
        last_preserved_timestamp=0.0 if state is None else state.last_preserved,
    )
    if state is None:
        message.Clear()
    return message
