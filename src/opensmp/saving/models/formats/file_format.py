"""What the package must know about a file format of models."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from opensmp.base.types import Model, PathLike
from opensmp.saving.models.inspection.inspection import Sizes
from opensmp.saving.models.inspection.safe_hdf5 import opened

HDF5 = b"\x89HDF\r\n\x1a\n"


class Target:
    """A path that a format may recognise.

    Attributes:
        exists: Whether it is a file or a directory.
        names: Names of the entries of a directory; empty for a file.
        begin: The first bytes of a file; empty for a directory.
    """

    def __init__(self, path: PathLike, what: str) -> None:
        self.path, self.what = Path(path), what
        self.name = os.fspath(path)
        self.is_directory = self.path.is_dir()
        self.exists = self.is_directory or self.path.exists()
        self.names = frozenset(os.listdir(self.path)) if self.is_directory else frozenset()
        self.begin = b""
        if self.exists and not self.is_directory:
            with self.path.open("rb") as file:
                self.begin = file.read(len(HDF5))

    @cached_property
    def in_hdf5(self) -> frozenset[str]:
        """Names of the attributes and groups at the root of an HDF5 file; empty for others."""
        if self.begin != HDF5:
            return frozenset()
        with opened(self.path, self.path, self.what) as file:
            return frozenset({*file.root.attrs, *file.root})


class Loading(NamedTuple):
    """How a whole model is to be loaded, as for `keras.saving.load_model`."""

    what: str
    compile: bool
    custom_objects: Mapping[str, Any] | None
    safe_mode: bool


@dataclass(frozen=True)
class FileFormat:
    """One file format; functions that it lacks are None.

    Attributes:
        title: What a file of the format is, in words.
        recognises: Whether a path has the format; may raise `SavingError` for half a file.
        load_weights: Loads weights, and the optimizer's state if requested, into a built model:
            (model, path, what, state).
        load_model: Loads a whole model.
        inspect: Validates an untrusted file: (path, what, whether its configuration is used);
            returns the sizes of its arrays.
        endings: Endings of names that `smp.save_model` writes this format for.
        save: Writes a model, atomically: (model, path, whether a file may be replaced).
        weights_of: The name of the file with the weights, of formats that keep them beside.
    """

    title: str
    recognises: Callable[[Target], bool]
    load_weights: Callable[[Model, PathLike, str, bool], None]
    load_model: Callable[[PathLike, Loading], Model] | None = None
    inspect: Callable[[PathLike, str, bool], Sizes] | None = None
    endings: tuple[str, ...] = ()
    save: Callable[[Model, str, bool], None] | None = None
    weights_of: Callable[[str], str] | None = None
