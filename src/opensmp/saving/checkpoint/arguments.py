"""Validates the arguments of `CheckpointManager`; one error lists all faults."""

from __future__ import annotations

import numbers
import operator
import os
from typing import Any

import tensorflow as tf

from opensmp.base.message_text import sentence
from opensmp.errors import CheckpointError
from opensmp.saving.checkpoint.directory.names import is_pattern


def check_arguments(
    checkpoint: Any,
    directory: Any,
    max_to_keep: Any,
    checkpoint_name: Any,
    *,
    every_n_hours: Any,
    step_counter: Any,
    checkpoint_interval: Any,
    init_fn: Any,
    background: Any,
) -> None:
    """Validates the arguments of `smp.CheckpointManager`."""
    faults = []
    if not isinstance(background, bool):
        faults.append(f"background must be True or False; received {background!r}")
    if not isinstance(checkpoint, tf.train.Checkpoint):
        faults.append(
            "checkpoint must be a tf.train.Checkpoint, such as tf.train.Checkpoint(model=model, "
            f"optimizer=optimizer); received {checkpoint!r} of type {type(checkpoint).__name__}"
        )
    try:
        if "://" in os.fspath(directory) or "\0" in os.fspath(directory):
            faults.append(
                f"directory must be on a file system, for files are renamed there; received "
                f"{directory!r}"
            )
    except TypeError:
        faults.append(f"directory must be a path; received {directory!r}")
    if max_to_keep is not None and not (_is_whole(max_to_keep) and max_to_keep >= 1):
        faults.append(f"max_to_keep must be None or 1 or more; received {max_to_keep!r}")
    is_name = isinstance(checkpoint_name, str) and checkpoint_name and "\0" not in checkpoint_name
    if isinstance(checkpoint_name, numbers.Real):
        faults.append(
            f"checkpoint_name must be a text; received {checkpoint_name!r}. The argument that "
            "tf.train.CheckpointManager has in this place is keep_checkpoint_every_n_hours: give "
            "it by its name"
        )
    elif not is_name or os.path.basename(checkpoint_name) != checkpoint_name:
        faults.append(
            f"checkpoint_name must be the beginning of a file name; received {checkpoint_name!r}"
        )
    elif is_pattern(checkpoint_name):
        faults.append(
            "checkpoint_name must have none of []*?\\, which TensorFlow takes for a pattern of "
            f"names when it reads; received {checkpoint_name!r}"
        )
    is_number = isinstance(every_n_hours, numbers.Real) and not isinstance(every_n_hours, bool)
    if every_n_hours is not None and not (is_number and every_n_hours >= 0):
        faults.append(
            "keep_checkpoint_every_n_hours must be None or a number of hours; received "
            f"{every_n_hours!r}"
        )
    if checkpoint_interval is not None:
        if not (_is_whole(checkpoint_interval) and checkpoint_interval >= 0):
            faults.append(
                f"checkpoint_interval must be None or a number of steps; received "
                f"{checkpoint_interval!r}"
            )
        if step_counter is None:
            faults.append("step_counter must be given with checkpoint_interval: a tf.Variable")
    if init_fn is not None and not callable(init_fn):
        faults.append(f"init_fn must be a function; received {init_fn!r}")
    if faults:
        raise CheckpointError(f"smp.CheckpointManager: {sentence(faults)}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_options(options: Any) -> None:
    """Raises `CheckpointError` if `save` got `options`, which only TensorFlow's writer supports."""
    if options is not None:
        raise CheckpointError(
            f"smp.CheckpointManager.save: expected no options, received {options!r}, which are "
            "for TensorFlow's own writer. To write in the background, make the manager with "
            "background=True."
        )


def whole_number(number: Any) -> int:
    """Converts a checkpoint number, which may be a variable or a tensor, to an `int`."""
    try:
        return operator.index(number.numpy() if hasattr(number, "numpy") else number)
    except TypeError as error:
        raise CheckpointError(
            f"checkpoint_number must be a whole number; received {number!r}."
        ) from error
