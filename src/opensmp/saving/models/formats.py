"""Detects the format of a model file from its contents, not only from its name."""

from __future__ import annotations

import contextlib
import difflib
import os
import tempfile
import zipfile
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

from opensmp.errors import SavingError
from opensmp.saving.atomic import is_remote
from opensmp.saving.models.inspection.damage import half
from opensmp.saving.models.inspection.safe_hdf5 import opened

_ZIP, _HDF5 = b"PK", b"\x89HDF\r\n\x1a\n"
_INDEX = ".index"


class Format(Enum):
    """File formats of models; the value describes the format in messages."""

    KERAS = "a .keras file"
    KERAS_DIRECTORY = "a .keras directory"
    H5 = "a whole model in HDF5"
    H5_WEIGHTS = "weights in HDF5, as Keras 2 wrote them"
    WEIGHTS = "a .weights.h5 file"
    JSON = "a configuration in JSON"
    SAVED_MODEL = "a TensorFlow SavedModel"
    CHECKPOINT = "a TensorFlow checkpoint"


def format_of(path: str | os.PathLike[str], what: str) -> Format:
    """Detects the format of a path.

    Args:
        path: A file, a directory, or the prefix of a checkpoint.
        what: Name of the operation for messages.

    Raises:
        SavingError: The path does not exist, cannot be read, is truncated, or has an unknown
            format.

    Example:
        ```python
        format_of("model.keras", "smp.load_model")  # Format.KERAS
        ```
    """
    name = os.fspath(path)
    if is_remote(name):
        return _of_name(name, what)
    target = Path(name)
    try:
        if target.is_dir():
            return _of_directory(target, what)
        if not target.exists():
            if Path(name + _INDEX).exists():
                return Format.CHECKPOINT
            raise SavingError(f"{what}: there is nothing at {name}.{_alike(target)}")
        with target.open("rb") as file:
            begin = file.read(len(_HDF5))
    except PermissionError as error:
        raise SavingError(
            f"{what}: this process may not read {error.filename or name}. Change its permissions, "
            "or copy it to a place that may be read."
        ) from error
    return _of_contents(target, begin, what)


def checkpoint_prefix(path: str | os.PathLike[str], what: str) -> str:
    """The prefix of a checkpoint: `path` itself, or the newest checkpoint in a directory."""
    name = os.fspath(path)
    if Path(name).is_dir():
        from tensorflow import train

        newest = train.latest_checkpoint(name)
        if newest is None:
            raise SavingError(
                f"{what}: the file 'checkpoint' in {name} names no checkpoint that is there. Give "
                "the path of one, without endings."
            )
        return str(newest)
    return name.removesuffix(_INDEX)


@contextlib.contextmanager
def named(path: str | os.PathLike[str], ending: str) -> Iterator[str]:
    """Yields a name for a file that ends with `ending`, from which Keras derives the format.

    Args:
        path: The file.
        ending: A suffix such as `".keras"`.
    """
    name = os.fspath(path)
    also = name.endswith(".hdf5") and ending == ".h5"
    if is_remote(name) or also or (name.endswith(ending) and _kind(name) == ending):
        yield name
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, f"model{ending}")
        link.symlink_to(Path(name).absolute())
        yield str(link)


def _kind(name: str) -> str:
    return next(e for e in (".weights.h5", ".h5", ".keras", "") if name.endswith(e))


def weights_beside(name: str) -> str:
    """The name of the weights file that belongs to a JSON configuration file."""
    return f"{name.removesuffix('.json')}.weights.h5"


def _of_name(name: str, what: str) -> Format:
    if name.endswith(".keras"):
        return Format.KERAS
    raise SavingError(
        f"{what}: {name} is on another machine, from where .keras files alone are read. Copy it "
        "to this machine first."
    )


def _of_directory(target: Path, what: str) -> Format:
    names = set(os.listdir(target))
    if "saved_model.pb" in names:
        return Format.SAVED_MODEL
    if {"config.json", "model.weights.h5"} <= names:
        return Format.KERAS_DIRECTORY
    if "checkpoint" in names:
        return Format.CHECKPOINT
    if "variables" in names and "assets" in names:
        raise SavingError(
            f"{what}: {target} is half a SavedModel: saved_model.pb is missing. Write it again."
        )
    found = ", ".join(sorted(names)[:5]) or "nothing"
    raise SavingError(
        f"{what}: the directory {target} holds no model. Expected: saved_model.pb, or config.json "
        f"and model.weights.h5, or the file 'checkpoint'; found: {found}."
    )


def _of_contents(target: Path, begin: bytes, what: str) -> Format:
    name = target.name
    if begin.startswith(_ZIP):
        if not zipfile.is_zipfile(target):
            raise SavingError(half(target, what, "its list of contents, at the end, is missing"))
        return Format.KERAS
    if begin == _HDF5:
        return _of_hdf5(target, what)
    if name.endswith(_INDEX):
        return Format.CHECKPOINT
    if name.endswith(".json"):
        return Format.JSON
    if name.endswith((".keras", ".h5", ".hdf5")):
        size = target.stat().st_size
        raise SavingError(
            half(target, what, f"its {size:,} bytes do not begin as such a file does")
        )
    if name.endswith((".npy", ".npz", ".pkl", ".pickle", ".joblib")):
        raise SavingError(
            f"{what}: {target} is not read, for arrays of objects and pickles run code of whoever "
            "wrote them. Read it where you trust it, and write the model with "
            "smp.save_model(model, 'model.keras')."
        )
    raise SavingError(
        f"{what}: {target} has no format that is known. Expected: a .keras, .h5 or .weights.h5 "
        "file, a .json file with a model's configuration, the directory of a SavedModel, or a "
        "checkpoint's path without endings."
    )


def _of_hdf5(target: Path, what: str) -> Format:
    with opened(target, target, what) as file:
        attributes = file.root.attrs
        if "model_config" in attributes:
            return Format.H5
        if "layer_names" in attributes or "layer_names0" in attributes:
            return Format.H5_WEIGHTS
        return Format.H5_WEIGHTS if "model_weights" in file.root else Format.WEIGHTS


def _alike(target: Path) -> str:
    """A hint about similar names or existing files."""
    folder = next(p for p in target.absolute().parents if p.exists())
    if folder != target.absolute().parent:
        return f" The nearest directory that exists is {folder}."
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return ""
    near = difflib.get_close_matches(target.name, names, n=3)
    if near:
        return f" Did you mean {', '.join(near)}?"
    return f" {folder} has {', '.join(names[:5]) or 'no files'}."
