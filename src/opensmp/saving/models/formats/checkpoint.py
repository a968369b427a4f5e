"""TensorFlow checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Model, PathLike
from opensmp.distributed import world
from opensmp.errors import CheckpointError, SavingError
from opensmp.saving.checkpoint.manager import CheckpointManager
from opensmp.saving.models import save
from opensmp.saving.models.formats.file_format import FileFormat, Target
from opensmp.saving.models.formats.optimizer_slots import build_optimizer
from opensmp.saving.models.formats.paths import INDEX, checkpoint_prefix


def _is_checkpoint(target: Target) -> bool:
    if target.is_directory:
        return "checkpoint" in target.names
    return target.path.name.endswith(INDEX) if target.exists else Path(target.name + INDEX).exists()


def _checkpoint(model: Model, path: PathLike, what: str, state: bool) -> None:
    prefix = checkpoint_prefix(path, what)
    keys = [name for name, _ in tf.train.list_variables(prefix)]
    if not state:
        # With existing slots, no value in the file is deferred until slots are created.
        build_optimizer(model)
        variables = getattr(getattr(model, "optimizer", None), "variables", ())
        kept = [(v, np.asarray(v)) for v in variables if not _private.is_elsewhere(v)]
        _restore(model, prefix, keys, None, what)
        for variable, value in kept:
            variable.assign(value)
        return
    _restore(model, prefix, keys, getattr(model, "optimizer", None), what)


def _restore(model: Model, prefix: str, keys: Sequence[str], optimizer: Any, what: str) -> None:
    """Restores a checkpoint, whose layout of objects is detected from its keys."""
    is_child = any(key.startswith("model/") for key in keys)
    with_optimizer = optimizer is not None and any(map(_is_slot, keys))
    if with_optimizer:
        build_optimizer(model)
    if not is_child and not any(key.startswith("optimizer/") for key in keys):
        checkpoint = tf.train.Checkpoint(model)
    elif with_optimizer:
        checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer)
    else:
        checkpoint = tf.train.Checkpoint(model=model)
    _restore_with(model, checkpoint, prefix, optimizer is None or not with_optimizer, what)
    if optimizer is None or with_optimizer:
        return
    for name, attribute in _SCALARS.items():
        key = f"optimizer/{name}/.ATTRIBUTES/VARIABLE_VALUE"
        variable: Any = getattr(optimizer, attribute, None)
        if key in keys and hasattr(variable, "assign"):
            variable.assign(tf.train.load_variable(prefix, key))


def _restore_with(model: Model, checkpoint: Any, prefix: str, partial: bool, what: str) -> None:
    if world.is_initialized():
        manager = CheckpointManager(checkpoint, Path(prefix).absolute().parent)
        try:
            manager.restore(prefix, partial=partial)
        except CheckpointError as error:
            raise SavingError(f"{what}: {error}") from error
        return
    _restore_plainly(model, checkpoint, prefix, what)


_SCALARS = {"_iterations": "iterations", "_learning_rate": "learning_rate"}


def _is_slot(key: str) -> bool:
    """Whether a key is an optimizer slot; an optimizer without updates has only scalars."""
    return key.startswith("optimizer/") and key.split("/")[1] not in _SCALARS


def _restore_plainly(model: Model, checkpoint: Any, prefix: str, what: str) -> None:
    """TensorFlow's restore, which assigns before it detects a mismatch; reverts after an error."""
    before = [np.asarray(variable) for variable in model.variables]
    try:
        checkpoint.read(prefix).assert_existing_objects_matched()
    except (AssertionError, ValueError, tf.errors.OpError) as error:
        for variable, value in zip(model.variables, before, strict=True):
            variable.assign(value)
        mine = "".join(f"\n  {v.path} {tuple(v.shape)}" for v in model.variables[:5])
        theirs = "".join(
            f"\n  {key.removesuffix('/.ATTRIBUTES/VARIABLE_VALUE')} {tuple(shape)}"
            for key, shape in tf.train.list_variables(prefix)
            if key.endswith("VARIABLE_VALUE")
        )
        raise SavingError(
            f"{what}: the checkpoint {prefix} is of another model: {_first(error)}\nThe model "
            f"begins with{mine}\nThe checkpoint has{theirs}"
        ) from error


def _first(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]


def _save(model: Model, path: str, overwrite: bool) -> None:
    save.check_overwrite("smp.save_model", path, overwrite, beside=(path + INDEX,))
    save.write_checkpoint(model, path, "smp.save_model")


CHECKPOINT = FileFormat(
    "a TensorFlow checkpoint",
    recognises=_is_checkpoint,
    load_weights=_checkpoint,
    endings=(".ckpt",),
    save=_save,
)
