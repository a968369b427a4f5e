"""Detects the format of a model file from its contents, not only from its name."""

from __future__ import annotations

import difflib
import os
from enum import Enum
from pathlib import Path

from opensmp.base.types import PathLike
from opensmp.errors import SavingError
from opensmp.saving.atomic import is_remote
from opensmp.saving.models.formats.checkpoint import CHECKPOINT
from opensmp.saving.models.formats.file_format import FileFormat, Target
from opensmp.saving.models.formats.hdf5_files import H5, H5_WEIGHTS
from opensmp.saving.models.formats.json_file import JSON
from opensmp.saving.models.formats.keras_files import KERAS, KERAS_DIRECTORY, WEIGHTS
from opensmp.saving.models.formats.saved_model import SAVED_MODEL
from opensmp.saving.models.inspection.damage import explained, half
from opensmp.saving.models.inspection.inspection import Sizes


class Format(Enum):
    """File formats of models; a path has the first one that recognises it."""

    KERAS = KERAS
    H5 = H5
    H5_WEIGHTS = H5_WEIGHTS
    WEIGHTS = WEIGHTS
    JSON = JSON
    SAVED_MODEL = SAVED_MODEL
    KERAS_DIRECTORY = KERAS_DIRECTORY
    CHECKPOINT = CHECKPOINT


def format_of(path: str | os.PathLike[str], what: str) -> Format:
    """Detects the format of a path."""
    name = os.fspath(path)
    if is_remote(name):
        return _of_name(name, what)
    try:
        target = Target(path, what)
        found = next((each for each in Format if each.value.recognises(target)), None)
    except PermissionError as error:
        raise SavingError(
            f"{what}: this process may not read {error.filename or name}. Change its permissions, "
            "or copy it to a place that may be read."
        ) from error
    if found is None:
        raise _unknown(target)
    return found


def format_for(name: str) -> FileFormat | None:
    """The format that `smp.save_model` writes for a name; None if the ending says none."""
    known = {ending: each.value for each in Format for ending in each.value.endings}
    fitting = [ending for ending in known if ending and name.endswith(ending)]
    if fitting:
        return known[max(fitting, key=len)]
    suffix = Path(name).suffix
    return None if suffix and not suffix[1:].isdigit() else known[""]


def inspected(path: PathLike, kind: Format, what: str, *, whole: bool = False) -> Sizes | None:
    """Validates a whole file and returns its sizes, None for formats that TensorFlow reads.

    Refuses harmful contents, also of the configuration if `whole`. Remote files are not read.
    """
    inspect = kind.value.inspect
    if inspect is None or is_remote(os.fspath(path)):
        return None
    with explained(path, what):
        return inspect(path, what, whole)


def _of_name(name: str, what: str) -> Format:
    if name.endswith(".keras"):
        return Format.KERAS
    raise SavingError(
        f"{what}: {name} is on another machine, from where .keras files alone are read. Copy it "
        "to this machine first."
    )


def _unknown(target: Target) -> SavingError:
    path, name, what = target.path, target.path.name, target.what
    if not target.exists:
        return SavingError(f"{what}: there is nothing at {target.name}.{_alike(path)}")
    if target.is_directory:
        return _no_model(target)
    if name.endswith((".keras", ".h5", ".hdf5")):
        size = path.stat().st_size
        why = f"its {size:,} bytes do not begin as such a file does"
        return SavingError(half(path, what, why))
    if name.endswith((".npy", ".npz", ".pkl", ".pickle", ".joblib")):
        return SavingError(
            f"{what}: {path} is not read, for arrays of objects and pickles run code of whoever "
            "wrote them. Read it where you trust it, and write the model with "
            "smp.save_model(model, 'model.keras')."
        )
    return SavingError(
        f"{what}: {path} has no format that is known. Expected: a .keras, .h5 or .weights.h5 "
        "file, a .json file with a model's configuration, the directory of a SavedModel, or a "
        "checkpoint's path without endings."
    )


def _no_model(target: Target) -> SavingError:
    if {"variables", "assets"} <= target.names:
        return SavingError(
            f"{target.what}: {target.path} is half a SavedModel: saved_model.pb is missing. Write "
            "it again."
        )
    found = ", ".join(sorted(target.names)[:5]) or "nothing"
    return SavingError(
        f"{target.what}: the directory {target.path} holds no model. Expected: saved_model.pb, or "
        f"config.json and model.weights.h5, or the file 'checkpoint'; found: {found}."
    )


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
