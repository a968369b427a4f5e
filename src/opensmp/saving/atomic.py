"""Files that are there whole or not at all.

What is written goes to a temporary name beside its place and is renamed when it is complete, so
that a crash, a full disk or an error leaves what was there before.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import tensorflow as tf

from opensmp.errors import SavingError

_PREFIX = ".saving-"


def is_remote(path: str) -> bool:
    """Whether a path names no file of this machine's file systems, such as `gs://` or `hf://`."""
    return "://" in path


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[str]:
    """Context that gives the name to write a file under, and moves it to `path` at the end.

    Args:
        path: The file to make or to replace; directories above it are made.

    Example:
        ```python
        with new_file("model.keras") as name:  # ".saving-1f0c-model.keras"
            model.save(name)
        ```
    """
    target = Path(path)
    with _explained(target):
        if target.is_dir():
            raise SavingError(f"{target} is a directory; expected the name of a file to write.")
        target.parent.mkdir(parents=True, exist_ok=True)
        # The name ends alike, for Keras takes the format from it.
        temporary = target.parent / f"{_PREFIX}{secrets.token_hex(4)}-{target.name}"
        try:
            yield str(temporary)
            to_disk(temporary)
            temporary.replace(target)
        finally:
            _remove(temporary)


@contextlib.contextmanager
def new_prefix(prefix: str | os.PathLike[str], last: str) -> Iterator[str]:
    """As `new_file`, for several files whose names begin alike, such as a checkpoint.

    Args:
        prefix: What the names begin with.
        last: The ending of the file that readers look for; it gets its name last.
    """
    target = Path(prefix)
    with _explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        begin = f"{_PREFIX}{secrets.token_hex(4)}-{target.name}"
        try:
            yield str(target.parent / begin)
            written = list(target.parent.glob(f"{begin}*"))
            for file in sorted(written, key=lambda file: file.name.endswith(last)):
                to_disk(file)
                file.replace(target.parent / f"{target.name}{file.name.removeprefix(begin)}")
        finally:
            for file in target.parent.glob(f"{begin}*"):
                _remove(file)


@contextlib.contextmanager
def new_directory(path: str | os.PathLike[str], entry: str) -> Iterator[str]:
    """As `new_file`, for a directory that may have other contents.

    A new or empty directory comes into being by one rename. In one that has contents, which may
    be a mount, the new entries replace those of the same name; meanwhile `entry` is missing, so
    that readers never take old and new parts together.

    Args:
        path: The directory.
        entry: Name of the file in it without which it cannot be read, such as `saved_model.pb`.
    """
    target = Path(path)
    with _explained(target):
        if target.exists() and not target.is_dir():
            raise SavingError(f"{target} is a file; expected the name of a directory to write.")
        target.parent.mkdir(parents=True, exist_ok=True)
        full = target.is_dir() and (any(target.iterdir()) or os.path.ismount(target))
        temporary = (target if full else target.parent) / f"{_PREFIX}{secrets.token_hex(4)}"
        try:
            yield str(temporary)
            for file in temporary.rglob("*"):
                if file.is_file():
                    to_disk(file)
            if full:
                _exchange(temporary, target, entry)
            else:
                temporary.replace(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _exchange(new: Path, target: Path, entry: str) -> None:
    """Moves all entries of `new` into `target`, that of the name `entry` last."""
    old = new / "replaced"
    names = sorted((file.name for file in new.iterdir()), key=lambda name: name == entry)
    old.mkdir()
    taken: list[str] = []
    given: list[str] = []
    try:
        for name in reversed(names):  # `entry` first
            if (target / name).exists():
                (target / name).rename(old / name)
                taken.append(name)
        for name in names:
            (new / name).rename(target / name)
            given.append(name)
    except OSError:
        for name in given:
            (target / name).rename(new / name)
        for name in reversed(taken):
            (old / name).rename(target / name)
        raise


def to_disk(path: str | os.PathLike[str]) -> None:
    """Waits until a file's contents, or the renames in a directory, are on the disk.

    A rename alone may come before the contents, and neither need outlast a loss of power.
    """
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _remove(file: Path) -> None:
    with contextlib.suppress(OSError):
        file.unlink()


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SavingError(
            f"{target} could not be written: {error.strerror or error}. What was there before is "
            f"still there. {advice(error, target)}"
        ) from error


def advice(error: Exception, target: Path) -> str:
    """What to do about an error of the file system: free space, or another place.

    Args:
        error: The error.
        target: What was to be written; it need not exist.
    """
    where = next((p for p in (target, *target.parents) if p.exists()), Path("/"))
    if isinstance(error, (PermissionError, tf.errors.PermissionDeniedError)):
        return f"This process may not write to {where}; choose another place."
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(where).free
        return f"{free / 2**20:,.0f} MiB are free at {where}."
    return f"The nearest directory that exists is {where}."
