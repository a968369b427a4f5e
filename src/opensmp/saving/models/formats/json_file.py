"""A configuration in JSON, with the weights in a file beside it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import keras

from opensmp.base.types import Model, PathLike
from opensmp.errors import SavingError
from opensmp.saving.models import save
from opensmp.saving.models.formats.file_format import FileFormat, Loading
from opensmp.saving.models.formats.optimizer_slots import build_optimizer
from opensmp.saving.models.formats.paths import weights_beside
from opensmp.saving.models.inspection.json_text import object_of
from opensmp.saving.models.inspection.variable_bound import variables_bounded


def _load_weights(model: Model, path: PathLike, what: str, state: bool) -> None:
    from opensmp.saving.models.formats.formats import format_of
    from opensmp.saving.models.load import load_into  # which know this format as well

    _configuration(path, what)
    weights = weights_beside(os.fspath(path))
    load_into(model, weights, format_of(weights, what), what, state=state)


def _load_model(path: PathLike, loading: Loading) -> Model:
    from opensmp.saving.models.formats.formats import format_of, inspected
    from opensmp.saving.models.load import load_into

    what, name = loading.what, os.fspath(path)
    config = _configuration(path, what)
    weights = weights_beside(name)
    kind = format_of(weights, what)
    if "class_name" not in config:
        raise SavingError(
            f"{what}: {name} is no configuration of a model. Expected: what model.to_json() "
            "or smp.save_model(model, 'x.json') writes."
        )
    if not loading.compile:
        config.pop("compile_config", None)
    with variables_bounded(inspected(weights, kind, what), path, what):
        model = keras.saving.deserialize_keras_object(
            config,
            custom_objects=dict(loading.custom_objects or {}),
            safe_mode=loading.safe_mode,
        )
        if loading.compile:
            build_optimizer(model)
    load_into(model, weights, kind, what)
    return model


def _configuration(path: PathLike, what: str) -> dict[str, Any]:
    name = os.fspath(path)
    config = object_of(Path(name).read_bytes(), name, what)
    if "weight_map" in config:
        raise SavingError(
            f"{what}: {name} is the list of contents of weights in several files, and no "
            "configuration. Make the model and call model.load_weights(path)."
        )
    return config


def _save(model: Model, path: str, overwrite: bool) -> None:
    save.check_overwrite("smp.save_model", path, overwrite)
    save.write_json(model, path, weights_beside(path), "smp.save_model")


JSON = FileFormat(
    "a configuration in JSON",
    recognises=lambda target: (
        not target.is_directory and target.exists and target.path.name.endswith(".json")
    ),
    load_weights=_load_weights,
    load_model=_load_model,
    endings=(".json",),
    save=_save,
    weights_of=weights_beside,
)
