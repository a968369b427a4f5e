"""Loads weights from a file of any format into an existing model."""

from __future__ import annotations

import contextlib
import os
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Model
from opensmp.distributed import world
from opensmp.errors import CheckpointError, SavingError
from opensmp.saving.checkpoint.manager import CheckpointManager
from opensmp.saving.models import weight_check
from opensmp.saving.models.formats import Format, checkpoint_prefix, named
from opensmp.saving.models.inspection.damage import explained
from opensmp.saving.models.inspection.inspection import inspected
from opensmp.saving.models.inspection.safe_hdf5 import opened
from opensmp.saving.models.keras2.hdf5 import restore_optimizer

PathLike = str | os.PathLike[str]


def load_into(model: Model, path: PathLike, kind: Format, what: str, *, state: bool = True) -> None:
    """Loads weights, and optimizer state if the file has it, into a model.

    Args:
        model: A built Keras model.
        path: The file.
        kind: Its format.
        what: Name of the operation for messages.
        state: Whether to restore the optimizer's state and learning rate.

    Raises:
        SavingError: The file is damaged, refers to values in other files, or has the weights of a
            different model; nothing was assigned.
    """
    if not model.built:
        raise SavingError(
            f"{what}: model '{model.name}' has no weights yet, for the shapes of its inputs are "
            "not known. Call it with one batch first."
        )
    with explained(path, what), _scope_of(model):
        inspected(path, kind, what)
        _BY_KIND[kind](model, path, what, state)


def _scope_of(model: Model) -> Any:
    """The strategy scope of a model's variables, unless a strategy is already active."""
    strategy = getattr(model, "distribute_strategy", None)
    if strategy is None or tf.distribute.has_strategy():
        return contextlib.nullcontext()
    return strategy.scope()


def _weights_file(model: Model, path: PathLike, what: str, state: bool) -> None:
    weight_check.check(weight_check.of_weights_file(model, path, what), path, what)
    if state and weight_check.has_optimizer(path, what):
        build_optimizer(model)
    optimizer = None if state else getattr(model, "optimizer", None)
    kept = [] if optimizer is None else [(v, np.asarray(v)) for v in optimizer.variables]
    ending = ".keras" if zipfile.is_zipfile(path) else ".weights.h5"
    with named(path, ending) as name, warnings.catch_warnings():
        if not state:
            warnings.filterwarnings("ignore", "Skipping variable loading for optimizer")
        model.load_weights(name)
    for variable, value in kept:
        variable.assign(value)


def _directory(model: Model, path: PathLike, what: str, state: bool) -> None:
    _weights_file(model, Path(path, "model.weights.h5"), what, state)


def _layers_file(model: Model, path: PathLike, what: str, state: bool) -> None:
    with opened(path, path, what) as file:
        within = file.group("model_weights") if "model_weights" in file.root else file.root
        weight_check.check(weight_check.of_layers(model, file, within), path, what)
    with named(path, ".h5") as name:
        model.load_weights(name)
    if state:
        restore_optimizer(model, path, what)


def _saved_model(model: Model, path: PathLike, what: str, state: bool) -> None:
    loaded = tf.saved_model.load(os.fspath(path))
    variables = list(getattr(loaded, "variables", ()))
    mine = [(variable.path, tuple(variable.shape)) for variable in model.variables]
    theirs = [(variable.name, tuple(variable.shape)) for variable in variables]
    weight_check.check(weight_check.in_order(mine, theirs), path, what)
    with _private.assignments_elsewhere_ignored():
        for variable, value in zip(model.variables, variables, strict=True):
            variable.assign(np.asarray(value))


def _checkpoint(model: Model, path: PathLike, what: str, state: bool) -> None:
    prefix = checkpoint_prefix(path, what)
    keys = [name for name, _ in tf.train.list_variables(prefix)]
    if not state:
        # With existing slots, no value in the file is deferred until slots are created.
        build_optimizer(model)
        variables = getattr(getattr(model, "optimizer", None), "variables", ())
        kept = [(variable, np.asarray(variable)) for variable in variables]
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


_BY_KIND = {
    Format.KERAS: _weights_file,
    Format.WEIGHTS: _weights_file,
    Format.KERAS_DIRECTORY: _directory,
    Format.H5: _layers_file,
    Format.H5_WEIGHTS: _layers_file,
    Format.SAVED_MODEL: _saved_model,
    Format.CHECKPOINT: _checkpoint,
}


def build_optimizer(model: Model) -> None:
    """Creates the slots of a compiled model's optimizer, so that a file can restore them."""
    optimizer = getattr(model, "optimizer", None)
    if isinstance(optimizer, keras.optimizers.Optimizer) and not optimizer.built:
        optimizer.build(model.trainable_variables)
