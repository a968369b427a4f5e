"""The formats of Keras 3: `.keras` files and directories, and `.weights.h5`."""

from __future__ import annotations

import os
import warnings
import zipfile
from pathlib import Path

import keras
import numpy as np

from opensmp import _private
from opensmp.base.types import Model, PathLike
from opensmp.errors import SavingError
from opensmp.saving.models import save, weight_check
from opensmp.saving.models.formats.file_format import HDF5, FileFormat, Loading, Target
from opensmp.saving.models.formats.optimizer_slots import build_optimizer
from opensmp.saving.models.formats.paths import named
from opensmp.saving.models.inspection.damage import half
from opensmp.saving.models.inspection.inspection import of_archive, of_directory, of_hdf5


def _is_archive(target: Target) -> bool:
    if not target.begin.startswith(b"PK"):
        return False
    if not zipfile.is_zipfile(target.path):
        why = "its list of contents, at the end, is missing"
        raise SavingError(half(target.path, target.what, why))
    return True


def _load_model(path: PathLike, loading: Loading) -> Model:
    if os.path.isdir(path):
        return _load_named(os.fspath(path), loading)
    with named(path, ".keras") as name:
        return _load_named(name, loading)


def _load_named(name: str, loading: Loading) -> Model:
    return keras.saving.load_model(
        name,
        custom_objects=loading.custom_objects,
        compile=loading.compile,
        safe_mode=loading.safe_mode,
    )


def _weights_file(model: Model, path: PathLike, what: str, state: bool) -> None:
    weight_check.check(weight_check.of_weights_file(model, path, what), path, what)
    if state and weight_check.has_optimizer(path, what):
        build_optimizer(model)
    optimizer = None if state else getattr(model, "optimizer", None)
    here = () if optimizer is None else optimizer.variables
    kept = [(v, np.asarray(v)) for v in here if not _private.is_elsewhere(v)]
    ending = ".keras" if zipfile.is_zipfile(path) else ".weights.h5"
    with named(path, ending) as name, warnings.catch_warnings():
        if not state:
            warnings.filterwarnings("ignore", "Skipping variable loading for optimizer")
        model.load_weights(name)
    for variable, value in kept:
        variable.assign(value)


def _directory(model: Model, path: PathLike, what: str, state: bool) -> None:
    _weights_file(model, Path(path, "model.weights.h5"), what, state)


KERAS = FileFormat(
    "a .keras file",
    recognises=_is_archive,
    load_weights=_weights_file,
    load_model=_load_model,
    inspect=of_archive,
    endings=(".keras",),
    save=save.save,
)
KERAS_DIRECTORY = FileFormat(
    "a .keras directory",
    recognises=lambda target: target.names >= {"config.json", "model.weights.h5"},
    load_weights=_directory,
    load_model=_load_model,
    inspect=of_directory,
)
WEIGHTS = FileFormat(
    "a .weights.h5 file",
    recognises=lambda target: target.begin == HDF5,
    load_weights=_weights_file,
    inspect=of_hdf5,
    endings=(".weights.h5",),
    save=save.save_weights,
)
