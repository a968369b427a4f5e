"""Stores resume state in a weights file, for callbacks that resume training."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator

import h5py
import numpy as np

from opensmp.base.types import Model
from opensmp.saving.atomic import is_remote

_NAME = "smp_fit"
_SOURCE = "_smp_beside_weights"


@contextlib.contextmanager
def written(model: Model, paths: Collection[str], make: Callable[[], bytes]) -> Iterator[None]:
    """Context in which saving weights to some paths also stores additional data in the files.

    Plain Keras can still read such files.
    """
    model.__dict__[_SOURCE] = {os.path.abspath(path): make for path in paths}
    try:
        yield
    finally:
        del model.__dict__[_SOURCE]


def write(model: Model, path: str, temporary: str) -> None:
    """Adds the data registered by `written` for `path` to the weights file, now at `temporary`."""
    make = model.__dict__.get(_SOURCE, {}).get(os.path.abspath(path))
    if make is not None and not is_remote(path):
        with h5py.File(temporary, "a") as file:
            file.create_dataset(_NAME, data=np.frombuffer(make(), np.uint8))


def read(path: str) -> bytes | None:
    """Additional data in a weights file; None if there is none, or no such file."""
    if not os.path.exists(path):
        return None
    with h5py.File(path, "r") as file:
        found = file.get(_NAME)
        if not isinstance(found, h5py.Dataset) or found.dtype != np.uint8 or found.external:
            return None
        return bytes(found[()].tobytes())
