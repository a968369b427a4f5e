"""Atomic writes: a file is either complete or absent.

Data is written under a temporary name in the same directory and renamed when it is complete, so
that a crash, a full disk or an error leaves the previous file intact.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import tensorflow as tf

from opensmp.errors import SavingError
from opensmp.saving.hdf5_writes import failing_late

_PREFIX = ".saving-"


def is_remote(path: str) -> bool:
    """Whether a path has a URL scheme such as `gs://` or `hf://`, so is not a local file."""
    return "://" in path


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[str]:
    """Context that yields a temporary name to write to, and renames the file to `path` on exit.

    Args:
        path: The file to create or replace; missing parent directories are created. Remote ones, of
            this and of the contexts below, are written in place.
    """
    if is_remote(os.fspath(path)):
        yield os.fspath(path)
        return
    target = Path(path)
    with explained(target), _parents_of(target):
        if target.is_dir():
            raise SavingError(f"{target} is a directory; expected the name of a file to write.")
        # The name keeps its ending, because Keras derives the format from it.
        temporary = target.parent / f"{_PREFIX}{secrets.token_hex(4)}-{target.name}"
        try:
            with failing_late():
                yield str(temporary)
            to_disk(temporary)
            temporary.replace(target)
        finally:
            _remove(temporary)


@contextlib.contextmanager
def new_prefix(prefix: str | os.PathLike[str], last: str) -> Iterator[str]:
    """Like `new_file`, for files of a common prefix; that with suffix `last` is renamed last."""
    if is_remote(os.fspath(prefix)):
        yield os.fspath(prefix)
        return
    target = Path(prefix)
    with explained(target), _parents_of(target):
        begin = f"{_PREFIX}{secrets.token_hex(4)}-{target.name}"
        try:
            yield str(target.parent / begin)
            written = sorted(
                _beginning_with(target.parent, begin), key=lambda file: file.name.endswith(last)
            )
            places = [target.parent / f"{target.name}{f.name.removeprefix(begin)}" for f in written]
            for place in places:
                if place.is_dir():
                    raise SavingError(
                        f"{place} is a directory; expected the name of a file to write."
                    )
            for file in written:
                to_disk(file)
            for file, place in zip(written, places, strict=True):
                file.replace(place)
        finally:
            for file in _beginning_with(target.parent, begin):
                _remove(file)


@contextlib.contextmanager
def new_directory(path: str | os.PathLike[str], entry: str) -> Iterator[str]:
    """Like `new_file`, for a directory that may have other contents.

    A missing or empty directory is created by one rename. If the directory has contents, or is a
    mount or a symlink, the new files replace those of the same name only; meanwhile `entry` is
    missing, so that readers never see a mix of old and new files.
    """
    if is_remote(os.fspath(path)):
        yield os.fspath(path)
        return
    target = Path(path)
    with explained(target), _parents_of(target):
        if target.exists() and not target.is_dir():
            raise SavingError(f"{target} is a file; expected the name of a directory to write.")
        full = target.is_dir() and (
            any(target.iterdir()) or os.path.ismount(target) or target.is_symlink()
        )
        temporary = (target if full else target.parent) / f"{_PREFIX}{secrets.token_hex(4)}"
        try:
            with failing_late():
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


@contextlib.contextmanager
def new_files(folder: str | os.PathLike[str], entry: str) -> Iterator[str]:
    """Like `new_directory`, for some files of a directory, of which `entry` is renamed last."""
    if is_remote(os.fspath(folder)):
        yield os.fspath(folder)
        return
    target = Path(folder)
    with explained(target / entry), _parents_of(target / entry):
        if (target / entry).is_dir():
            raise SavingError(
                f"{target / entry} is a directory; expected the name of a file to write."
            )
        temporary = target / f"{_PREFIX}{secrets.token_hex(4)}"
        try:
            temporary.mkdir()
            with failing_late():
                yield str(temporary)
            for file in temporary.rglob("*"):
                if file.is_file():
                    to_disk(file)
            _exchange(temporary, target, entry)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _exchange(new: Path, target: Path, entry: str) -> None:
    """Moves all files of `new` into `target`, `entry` last; reverts all moves after an error."""
    found = [file.relative_to(new) for file in sorted(new.rglob("*"))]
    names = sorted(
        (name for name in found if not (new / name).is_dir()), key=lambda name: name == Path(entry)
    )
    in_the_way = [
        place
        for place in [target / name for name in found]
        if place.exists() and place.is_dir() != (new / place.relative_to(target)).is_dir()
    ]
    if in_the_way:
        raise SavingError(
            f"{target} has other things of the names that are to be written: "
            f"{', '.join(map(str, in_the_way))}. Give another path, or take them away."
        )
    old = new / "replaced"
    taken: list[Path] = []
    given: list[Path] = []
    made: list[Path] = []
    try:
        for name in found:
            if (new / name).is_dir() and not (target / name).exists():
                (target / name).mkdir()
                made.append(target / name)
        for name in reversed(names):  # `entry` first
            if (target / name).exists() or (target / name).is_symlink():
                (old / name).parent.mkdir(parents=True, exist_ok=True)
                (target / name).rename(old / name)
                taken.append(name)
        for name in names:
            (new / name).rename(target / name)
            given.append(name)
    except BaseException:
        for name in given:
            (target / name).rename(new / name)
        for name in reversed(taken):
            (old / name).rename(target / name)
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def to_disk(path: str | os.PathLike[str]) -> None:
    """Flushes a file's contents, or the renames in a directory, to disk (fsync).

    Without it a rename may reach the disk before the contents, and a power failure may lose both.
    """
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _beginning_with(folder: Path, begin: str) -> list[Path]:
    return [file for file in folder.iterdir() if file.name.startswith(begin)]


def _remove(file: Path) -> None:
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file, ignore_errors=True)
    with contextlib.suppress(OSError):
        file.unlink()


@contextlib.contextmanager
def _parents_of(target: Path) -> Iterator[None]:
    """Creates the missing parent directories of a path; removes them again after an error."""
    missing = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in missing:  # innermost first
            with contextlib.suppress(OSError):  # another process has added files
                folder.rmdir()
        raise


@contextlib.contextmanager
def explained(target: Path) -> Iterator[None]:
    """Converts file system errors of writing `target` to a `SavingError` with advice."""
    try:
        yield
    except SavingError:
        raise
    except (OSError, tf.errors.OpError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _OF_HDF5.search(str(error)):
            raise
        raise SavingError(
            f"{target} could not be written: {_reason(error)}. What was there before is still "
            f"there. {advice(error, target)}"
        ) from error


# HDF5 reports a failed write with its own exception on closing the file, not with an OSError.
_OF_HDF5 = re.compile(r"errno = \d+, error message = '([^']*)'")


def _reason(error: Exception) -> str:
    of_hdf5 = _OF_HDF5.search(str(error))
    if of_hdf5:
        return of_hdf5.group(1)
    if isinstance(error, OSError):
        return str(error.strerror or error)
    # "{{function_node ...}} name of the file; No space left on device [Op:SaveV2]"
    text = str(getattr(error, "message", error))
    text = re.sub(r"\s*\[Op:\w+\].*", "", re.sub(r"^\{\{.*?\}\}\s*", "", text), flags=re.DOTALL)
    return text.rpartition("; ")[2].strip()[:300] or type(error).__name__


def advice(error: Exception, target: Path) -> str:
    """Advice for a file system error of writing `target`, which need not exist."""
    where = next((p for p in (target, *target.parents) if p.exists()), Path("/"))
    if isinstance(error, (PermissionError, tf.errors.PermissionDeniedError)):
        return f"This process may not write to {where}; choose another place."
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        return f"The file system of {where} is read-only; choose another place."
    with contextlib.suppress(OSError):
        where = where if where.is_dir() else where.parent
        free = shutil.disk_usage(where).free
        return f"{free / 2**20:,.1f} MiB are free at {where}; free some, or choose another place."
    return f"The nearest directory that exists is {where}."
