"""Puts the weights of a file into a model that is there already."""

from __future__ import annotations

import contextlib
import os
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import tensorflow as tf

from opensmp.errors import CheckpointError, SavingError
from opensmp.runtime import world
from opensmp.saving import layouts
from opensmp.saving.checkpoint_manager import CheckpointManager
from opensmp.saving.formats import Format, checkpoint_prefix, named
from opensmp.saving.gather import assigning_own
from opensmp.saving.hdf5 import restore_optimizer

Model = Any
PathLike = str | os.PathLike[str]


def load_into(model: Model, path: PathLike, kind: Format, what: str, *, state: bool = True) -> None:
    """Gives a model the weights in a file, and its optimizer the state if the file has it.

    Args:
        model: A built Keras model.
        path: The file.
        kind: Its format.
        what: What is done, for messages.
        state: Whether the optimizer gets its state, with its learning rate.

    Raises:
        SavingError: The file has the weights of another model; none was assigned.
    """
    if not model.built:
        raise SavingError(
            f"{what}: model '{model.name}' has no weights yet, for the shapes of its inputs are "
            "not known. Call it with one batch first."
        )
    with _scope_of(model):
        _BY_KIND[kind](model, path, what, state)


def _scope_of(model: Model) -> Any:
    """The scope that the variables of a model and of its optimizer belong to."""
    strategy = getattr(model, "distribute_strategy", None)
    if strategy is None or tf.distribute.has_strategy():
        return contextlib.nullcontext()
    return strategy.scope()


def _weights_file(model: Model, path: PathLike, what: str, state: bool) -> None:
    layouts.check(layouts.of_weights_file(model, path), path, what)
    if state and layouts.has_optimizer(path):
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
    with h5py.File(path, "r") as file:
        group = file.get("model_weights", file)
        layouts.check(layouts.of_layers(model, group), path, what)
    with named(path, ".h5") as name:
        model.load_weights(name)
    if state:
        restore_optimizer(model, path)


def _saved_model(model: Model, path: PathLike, what: str, state: bool) -> None:
    loaded = tf.saved_model.load(os.fspath(path))
    variables = list(getattr(loaded, "variables", ()))
    mine = [(variable.path, tuple(variable.shape)) for variable in model.variables]
    theirs = [(variable.name, tuple(variable.shape)) for variable in variables]
    layouts.check(layouts.in_order(mine, theirs), path, what)
    with assigning_own():
        for variable, value in zip(model.variables, variables, strict=True):
            variable.assign(np.asarray(value))


def _checkpoint(model: Model, path: PathLike, what: str, state: bool) -> None:
    prefix = checkpoint_prefix(path, what)
    keys = [name for name, _ in tf.train.list_variables(prefix)]
    if not state:
        # With slots that are there already, nothing of the file waits for slots to be made.
        build_optimizer(model)
        variables = getattr(getattr(model, "optimizer", None), "variables", ())
        kept = [(variable, np.asarray(variable)) for variable in variables]
        _restore(model, prefix, keys, None, what)
        for variable, value in kept:
            variable.assign(value)
        return
    _restore(model, prefix, keys, getattr(model, "optimizer", None), what)


def _restore(model: Model, prefix: str, keys: Sequence[str], optimizer: Any, what: str) -> None:
    is_child = any(key.startswith("model/") for key in keys)
    with_optimizer = optimizer is not None and any(key.startswith("optimizer/") for key in keys)
    if with_optimizer:
        build_optimizer(model)
    if not is_child and not any(key.startswith("optimizer/") for key in keys):
        checkpoint = tf.train.Checkpoint(model)
    elif with_optimizer:
        checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer)
    else:
        checkpoint = tf.train.Checkpoint(model=model)
    if world.is_initialized():
        manager = CheckpointManager(checkpoint, Path(prefix).absolute().parent)
        try:
            manager.restore(prefix, partial=optimizer is None)
        except CheckpointError as error:
            raise SavingError(f"{what}: {error}") from error
        return
    _restore_plainly(model, checkpoint, prefix, what)


def _restore_plainly(model: Model, checkpoint: Any, prefix: str, what: str) -> None:
    """TensorFlow's restore, which assigns before it finds that something does not fit."""
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
    """Makes the slots of a compiled model's optimizer, so that a file can give their values."""
    optimizer = getattr(model, "optimizer", None)
    if isinstance(optimizer, keras.optimizers.Optimizer) and not optimizer.built:
        optimizer.build(model.trainable_variables)
