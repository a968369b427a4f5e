"""`smp.load_model` and `smp.save_model`: every file format, under any distribution strategy."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from opensmp.api.model.model import DistributedModel
from opensmp.base.types import Model
from opensmp.distributed import world
from opensmp.errors import SavingError
from opensmp.saving import atomic
from opensmp.saving.gather import together
from opensmp.saving.models import save
from opensmp.saving.models.formats import Format, format_of, named, weights_beside
from opensmp.saving.models.inspection.damage import explained
from opensmp.saving.models.inspection.inspection import inspected
from opensmp.saving.models.inspection.json_text import object_of
from opensmp.saving.models.inspection.variable_bound import variables_bounded
from opensmp.saving.models.keras2.hdf5 import load_hdf5
from opensmp.saving.models.load import build_optimizer, load_into
from opensmp.saving.models.same_file import check_same_file
from opensmp.saving.models.saved_model_layer import saved_model_as_keras

PathLike = str | os.PathLike[str]

_WHAT = "smp.load_model"
_WEIGHTS = ".weights.h5"


def load_model(
    path: PathLike,
    model: Model | Callable[[], Model] | None = None,
    *,
    compile: bool = True,
    custom_objects: Mapping[str, Any] | None = None,
    safe_mode: bool = True,
    distribute: bool | None = None,
) -> Model:
    """Loads a model saved in any format, whatever the strategy, partitions or processes were.

    The format is detected from the contents: `.keras`, `.h5` of Keras 3 and Keras 2, a
    configuration in `.json` with the weights beside it, a SavedModel; and with `model` also
    `.weights.h5` and TensorFlow checkpoints, or only the weights from the other formats. In the
    scope of a `tf.distribute` strategy the variables are created by the strategy. Optimizer state
    and compilation are restored if the file has them, so that training can resume.

    Nothing is unpickled. Lambda layers and custom classes need consent, as in Keras:
    `safe_mode=False`, `custom_objects`.

    With several processes the call is collective; each process reads the file, which must be the
    same everywhere.

    Args:
        path: A file, a directory, or the prefix of a checkpoint.
        model: A built model to load the weights into, or a function that creates one.
        compile: Whether to compile the model with its saved compilation arguments.
        custom_objects: Name to class or function, as in `keras.saving.load_model`.
        safe_mode: Whether to refuse code in the file, as in `keras.saving.load_model`.
        distribute: Whether to return a `smp.DistributedModel`; defaults to whether `smp.init` was
            called and no strategy scope is active.

    Returns:
        The model.

    Raises:
        SavingError: The path does not exist, cannot be read, is damaged, has an unknown format,
            refers to values in other files, needs consent or classes that were not given, or has
            the weights of a different model; nothing was changed. It is a `ValueError` whose
            message contains that of Keras and whose cause is the exception of Keras. With several
            processes all of them raise.

    Example:
        ```python
        smp.init({"partitions": 2})
        model = smp.load_model("trained_on_one_gpu.keras")  # a DistributedModel
        model.fit(x, y)

        smp.load_model("old.weights.h5", make_model)
        ```
    """
    # Detected first, because reading a checkpoint is a collective operation.
    kind = together(_WHAT, lambda: format_of(path, _WHAT))
    loaded = together(_WHAT, lambda: _load(path, kind, model, compile, custom_objects, safe_mode))
    check_same_file(path, _WHAT)
    if distribute is None:
        distribute = world.is_initialized() and not tf.distribute.has_strategy()
    return DistributedModel.from_keras(loaded) if distribute else loaded


def save_model(model: Model, path: PathLike, *, overwrite: bool = True) -> None:
    """Saves a whole model, distributed or plain Keras, in the format given by the path's suffix.

    Writes are atomic: a crash or a full disk leaves the previous file intact. With several
    processes the call is collective.

    Args:
        model: A built Keras model.
        path: `x.keras` or `x.h5` for the whole model; `x.weights.h5` for weights and optimizer
            state; `x.json` for the configuration, with `x.weights.h5` beside it; `x.ckpt` for a
            TensorFlow checkpoint; a name without a suffix for a SavedModel directory.
        overwrite: Whether an existing file may be replaced.

    Raises:
        SavingError: The model cannot be written.

    Example:
        ```python
        smp.save_model(model, "model.keras")
        smp.save_model(model, "served/1")  # plain TensorFlow serves it
        ```
    """
    name = os.fspath(path)
    if name.endswith(_WEIGHTS):
        save.save_weights(model, name, overwrite, None)
    elif name.endswith((".keras", ".h5", ".hdf5")):
        save.save(model, name, overwrite, None)
    elif not overwrite and (Path(name).exists() or Path(f"{name}.index").exists()):
        raise SavingError(
            f"smp.save_model: {name} exists already. Give another path, or overwrite=True."
        )
    elif name.endswith(".json"):
        save.write_json(model, name, weights_beside(name), "smp.save_model")
    elif name.endswith(".ckpt"):
        save.write_checkpoint(model, name, "smp.save_model")
    elif Path(name).suffix and not Path(name).suffix[1:].isdigit():
        raise SavingError(
            f"smp.save_model: {name} does not say the format. Expected: a name that ends with "
            ".keras, .h5, .weights.h5, .json or .ckpt, or a directory without ending for a "
            "SavedModel."
        )
    else:
        save.write_saved_model(model, name, what="smp.save_model")


# --------------------------------------------------------------------------------- helpers


def _load(
    path: PathLike,
    kind: Format,
    model: Model | Callable[[], Model] | None,
    compile: bool,
    custom_objects: Mapping[str, Any] | None,
    safe_mode: bool,
) -> Model:
    """Loads a model or, with `model`, only its weights; see `load_model`."""
    if model is not None and not isinstance(model, keras.Model):
        if not callable(model):
            raise SavingError(
                f"{_WHAT}: model must be a Keras model, or a function that makes one; received "
                f"{type(model).__name__}."
            )
        model = model()
    if model is not None and atomic.is_remote(os.fspath(path)):
        raise SavingError(
            f"{_WHAT}: weights alone are not read from another machine, {os.fspath(path)}. Copy "
            "the file to this machine first, or load the whole model."
        )
    with explained(path, _WHAT):
        if kind is Format.JSON:
            return _load_json(path, model, compile, custom_objects, safe_mode)
        if model is not None:
            load_into(model, path, kind, _WHAT)
            return model
        if kind in (Format.WEIGHTS, Format.H5_WEIGHTS, Format.CHECKPOINT):
            raise SavingError(
                f"{_WHAT}: {os.fspath(path)} is {kind.value}, which says nothing of the layers. "
                "Give the model it belongs to, or a function that makes it: "
                "smp.load_model(path, model)."
            )
        if kind is Format.SAVED_MODEL:
            return saved_model_as_keras(path)
        sizes = inspected(path, kind, _WHAT, whole=True)
        if kind is Format.H5:
            with variables_bounded(sizes, path, _WHAT):
                return load_hdf5(
                    path,
                    _WHAT,
                    compile=compile,
                    custom_objects=custom_objects,
                    safe_mode=safe_mode,
                )
        with variables_bounded(sizes, path, _WHAT), _as_keras_names_it(path, kind) as name:
            return keras.saving.load_model(
                name, custom_objects=custom_objects, compile=compile, safe_mode=safe_mode
            )


def _as_keras_names_it(path: PathLike, kind: Format) -> Any:
    if kind is Format.KERAS_DIRECTORY:
        return contextlib.nullcontext(path)
    return named(path, ".keras")


def _load_json(
    path: PathLike,
    model: Model | None,
    compile: bool,
    custom_objects: Mapping[str, Any] | None,
    safe_mode: bool,
) -> Model:
    """Loads a JSON configuration and the weights beside it."""
    name = os.fspath(path)
    weights = weights_beside(name)
    config = object_of(Path(name).read_bytes(), name, _WHAT)
    if "weight_map" in config:
        raise SavingError(
            f"{_WHAT}: {name} is the list of contents of weights in several files, and no "
            "configuration. Make the model and call model.load_weights(path)."
        )
    kind = format_of(weights, _WHAT)
    if model is None:
        if "class_name" not in config:
            raise SavingError(
                f"{_WHAT}: {name} is no configuration of a model. Expected: what model.to_json() "
                "or smp.save_model(model, 'x.json') writes."
            )
        if not compile:
            config.pop("compile_config", None)
        with variables_bounded(inspected(weights, kind, _WHAT), path, _WHAT):
            model = keras.saving.deserialize_keras_object(
                config, custom_objects=dict(custom_objects or {}), safe_mode=safe_mode
            )
            if compile:
                build_optimizer(model)
    load_into(model, weights, kind, _WHAT)
    return model
