"""TensorFlow SavedModels."""

from __future__ import annotations

import os

import numpy as np
import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Model, PathLike
from opensmp.saving.models import save, weight_check
from opensmp.saving.models.formats.file_format import FileFormat, Loading
from opensmp.saving.models.saved_model_layer import saved_model_as_keras


def _saved_model(model: Model, path: PathLike, what: str, state: bool) -> None:
    loaded = tf.saved_model.load(os.fspath(path))
    variables = list(getattr(loaded, "variables", ()))
    mine = [(variable.path, tuple(variable.shape)) for variable in model.variables]
    theirs = [(variable.name, tuple(variable.shape)) for variable in variables]
    weight_check.check(weight_check.in_order(mine, theirs), path, what)
    with _private.assignments_elsewhere_ignored():
        for variable, value in zip(model.variables, variables, strict=True):
            variable.assign(np.asarray(value))


def _load_model(path: PathLike, loading: Loading) -> Model:
    return saved_model_as_keras(path)


def _save(model: Model, path: str, overwrite: bool) -> None:
    save.check_overwrite("smp.save_model", path, overwrite)
    save.write_saved_model(model, path, what="smp.save_model")


SAVED_MODEL = FileFormat(
    "a TensorFlow SavedModel",
    recognises=lambda target: "saved_model.pb" in target.names,
    load_weights=_saved_model,
    load_model=_load_model,
    endings=("",),
    save=_save,
)
