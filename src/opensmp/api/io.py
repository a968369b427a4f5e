"""`smp.load_model` and `smp.save_model`: every file format, under any distribution strategy."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf

from opensmp.api.model.model import DistributedModel
from opensmp.base.types import Model, PathLike
from opensmp.distributed import world
from opensmp.errors import SavingError
from opensmp.saving import atomic
from opensmp.saving.gather import together
from opensmp.saving.models.formats.file_format import Loading
from opensmp.saving.models.formats.formats import Format, format_for, format_of, inspected
from opensmp.saving.models.inspection.damage import explained
from opensmp.saving.models.inspection.variable_bound import variables_bounded
from opensmp.saving.models.load import load_into
from opensmp.saving.models.same_file import check_same_file
from opensmp.saving.models.save import check_overwrite

_WHAT = "smp.load_model"


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
    found = format_for(name)
    if found is None or found.save is None:
        check_overwrite("smp.save_model", name, overwrite)
        *others, last = [e.value.endings[0] for e in Format if any(e.value.endings)]
        raise SavingError(
            f"smp.save_model: {name} does not say the format. Expected: a name that ends with "
            f"{', '.join(others)} or {last}, or a directory without ending for a SavedModel."
        )
    found.save(model, name, overwrite)


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
        if model is not None:
            load_into(model, path, kind, _WHAT)
            return model
        if kind.value.load_model is None:
            raise SavingError(
                f"{_WHAT}: {os.fspath(path)} is {kind.value.title}, which says nothing of the "
                "layers. Give the model it belongs to, or a function that makes it: "
                "smp.load_model(path, model)."
            )
        sizes = inspected(path, kind, _WHAT, whole=True)
        with variables_bounded(sizes, path, _WHAT):
            loading = Loading(_WHAT, compile, custom_objects, safe_mode)
            return kind.value.load_model(path, loading)
