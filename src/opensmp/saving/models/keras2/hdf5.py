"""Loads whole models in HDF5, written by Keras 3 or Keras 2."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np

from opensmp import _private
from opensmp.base.types import Model
from opensmp.saving.models.formats.paths import named
from opensmp.saving.models.inspection.safe_hdf5 import Hdf5, opened
from opensmp.saving.models.keras2.layer_configs import upgraded
from opensmp.saving.models.keras2.operation_nodes import name_operations
from opensmp.saving.models.keras2.training_configs import compile_arguments, optimizer_values

_KERNELS = ("kernel", "recurrent_kernel", "bias")


def load_hdf5(
    path: str | os.PathLike[str],
    what: str,
    *,
    compile: bool,
    custom_objects: Mapping[str, Any] | None,
    safe_mode: bool,
) -> Model:
    """Loads a `.h5` model, compiled and with optimizer state if the file has these.

    Keras itself fails on the losses and metrics of most compiled files, and drops the optimizer
    state.
    """
    custom = (*(custom_objects or {}), *keras.saving.get_custom_objects())
    with _readable(path, what, custom) as readable:
        model = keras.saving.load_model(
            readable, custom_objects=custom_objects, compile=False, safe_mode=safe_mode
        )
    with opened(path, path, what) as file:
        config = file.json("training_config") if compile else None
    if config is not None and config.get("optimizer_config"):
        with keras.saving.custom_object_scope(dict(custom_objects or {})):
            model.compile(**compile_arguments(config))
        restore_optimizer(model, path, what)
    return model


def restore_optimizer(model: Model, path: str | os.PathLike[str], what: str) -> None:
    """Restores a compiled model's optimizer from a `.h5` file, if that has optimizer state."""
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        return
    with opened(path, path, what) as file:
        has_state = "optimizer_weights" in file.root
    if not has_state:
        return
    optimizer.build(model.trainable_variables)
    variables = list(optimizer.variables)
    values: list[Any] | None = None
    with opened(path, path, what) as file:
        saved = _optimizer_weights(file)
        found = optimizer_values(saved, variables, model.trainable_variables)
        if found is not None:
            # All values are read before any is assigned; datasets of other shapes are not read.
            values = [
                None if dataset is None else file.array(dataset, tuple(variable.shape))
                for variable, dataset in zip(variables, found, strict=True)
            ]
    if values is None:
        warnings.warn(
            f"smp.load_model: the state of the optimizer in {path}, {len(saved)} arrays, does not "
            f"fit {type(optimizer).__name__}, which has {len(variables)}: training goes on with a "
            "new one.",
            stacklevel=2,
        )
        return
    with _private.assignments_elsewhere_ignored():
        for variable, value in zip(variables, values, strict=True):
            if value is not None:
                variable.assign(value)


@contextlib.contextmanager
def _readable(
    path: str | os.PathLike[str], what: str, custom: Collection[str] = ()
) -> Iterator[str]:
    """Yields a file that Keras 3 can read: the original, or a copy with a new configuration."""
    with opened(path, path, what) as file:
        config = file.configuration("model_config")
        version = file.text("keras_version") or "2"
    cudnn: dict[str, str] = {}
    changed = False
    if config is not None and version.split(".")[0] in ("1", "2"):
        new = upgraded(config, what)
        config, changed, cudnn = new.config, new.changed, new.cudnn
    elif config is not None:
        changed = name_operations(config, custom)
    if not changed:
        with named(path, ".h5") as name:
            yield name
        return
    with tempfile.TemporaryDirectory() as folder:
        name = str(Path(folder, "model.h5"))
        shutil.copyfile(path, name)
        with opened(name, path, what, "r+") as file:
            file.root.attrs["model_config"] = json.dumps(config)
            if cudnn:
                _convert_cudnn(file.group("model_weights"), cudnn)
        yield name


def _convert_cudnn(weights: Any, layers: Mapping[str, str]) -> None:
    """Converts weights of CuDNN layers to the standard layout, in place."""
    names: list[str] = []
    weights.visititems(lambda n, item: names.append(n) if isinstance(item, h5py.Dataset) else None)
    for name in names:
        parts = name.split("/")
        role = parts[-1].split(":")[0]
        owners = [layers[p] for p in map(_inner, parts[:-1]) if p in layers]
        if role in _KERNELS and owners:
            value = cudnn_weight(np.asarray(weights[name]), role, owners[-1])
            del weights[name]
            weights[name] = value


def _inner(name: str) -> str:
    """Name of the wrapped layer for a copy in a Bidirectional layer."""
    return name.removeprefix("forward_").removeprefix("backward_")


def cudnn_weight(value: Any, role: str, kind: str) -> Any:
    """Converts a weight of a CuDNN layer to the layout of `LSTM` or `GRU(reset_after=True)`.

    CuDNN stores each gate's matrix transposed, in one flat buffer, and two biases.

    Args:
        value: The array in the file.
        role: `"kernel"`, `"recurrent_kernel"` or `"bias"`.
        kind: `"LSTM"` or `"GRU"`.
    """
    if role == "bias":
        both = np.reshape(value, (2, -1))
        return both.sum(axis=0) if kind == "LSTM" else both
    gates = np.split(value, 4 if kind == "LSTM" else 3, axis=1)
    if role == "recurrent_kernel":
        return np.concatenate([gate.T for gate in gates], axis=1)
    return np.concatenate([gate.T.reshape(gate.shape, order="F") for gate in gates], axis=1)


def _optimizer_weights(file: Hdf5) -> list[tuple[str, Any]]:
    """Names and datasets of the optimizer state, not read yet."""
    if "optimizer_weights" not in file.root:
        return []
    group = file.group("optimizer_weights")
    return [(name, file.dataset(name, group)) for name in file.names(group, "weight_names")]
