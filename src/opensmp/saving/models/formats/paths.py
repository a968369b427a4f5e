"""Names of the files that belong to a model."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from opensmp.errors import SavingError
from opensmp.saving.atomic import is_remote

INDEX = ".index"


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
    return name.removesuffix(INDEX)


@contextlib.contextmanager
def named(path: str | os.PathLike[str], ending: str) -> Iterator[str]:
    """Yields a name for a file that ends with `ending`, from which Keras derives the format."""
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
