"""What lies in a file of weights beside the weights, for a callback that resumes training."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator
from typing import Any

import h5py
import numpy as np

Model = Any

_NAME = "smp_fit"
_SOURCE = "_smp_beside_weights"


@contextlib.contextmanager
def written(model: Model, paths: Collection[str], make: Callable[[], bytes]) -> Iterator[None]:
    """Context in which some files of a model's weights get something beside them.

    Plain Keras reads such a file as any other.

    Args:
        model: The model.
        paths: The files.
        make: Gives what is written, at the moment when the weights are.
    """
    model.__dict__[_SOURCE] = {os.path.abspath(path): make for path in paths}
    try:
        yield
    finally:
        del model.__dict__[_SOURCE]


def write(model: Model, path: str, temporary: str) -> None:
    """Adds what belongs beside the weights.

    Args:
        model: The model.
        path: The path that the file will have.
        temporary: The path that it has now.
    """
    make = model.__dict__.get(_SOURCE, {}).get(os.path.abspath(path))
    if make is not None:
        with h5py.File(temporary, "a") as file:
            file.create_dataset(_NAME, data=np.frombuffer(make(), np.uint8))


def read(path: str) -> bytes | None:
    """What lies beside the weights in a file, None if there is nothing, or no file."""
    if not os.path.exists(path):
        return None
    with h5py.File(path, "r") as file:
        found = file.get(_NAME)
        if not isinstance(found, h5py.Dataset) or found.dtype != np.uint8 or found.external:
            return None
        return bytes(found[()].tobytes())
