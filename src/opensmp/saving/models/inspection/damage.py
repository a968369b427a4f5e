"""Converts errors of reading a file to one `SavingError` with a helpful message."""

from __future__ import annotations

import contextlib
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import tensorflow as tf

from opensmp.base.types import PathLike
from opensmp.errors import SavingError, SmpError

_SHOWN = 1200  # characters kept at either end of an error's text; Keras quotes whole configurations
_UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    tf.errors.DataLossError,
)


def half(target: PathLike, what: str, why: str) -> str:
    """Error message for a file that is damaged or truncated."""
    return (
        f"{what}: {os.fspath(target)} is damaged or half a file: {why}. Copy or write it again; "
        "nothing was changed by loading it."
    )


@contextlib.contextmanager
def explained(path: PathLike, what: str) -> Iterator[None]:
    """Context that converts every error of reading a file to one that names the file."""
    name = os.fspath(path)
    try:
        yield
    except SmpError:
        raise
    except PermissionError as error:
        raise SavingError(f"{what}: this process may not read {name}: {error.strerror}.") from error
    except RecursionError as error:
        raise SavingError(
            f"{what}: {name} cannot be loaded: its configuration is nested too deeply. Expected: "
            "fewer than some hundred levels of models in models."
        ) from error
    except _UNREADABLE as error:
        raise SavingError(half(Path(path), what, _text(error))) from error
    except Exception as error:
        raise SavingError(
            f"{what}: {name} cannot be loaded: its contents are damaged, or need something that is "
            f"not there. {type(error).__name__}: {_text(error)}"
        ) from error


def _text(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    if len(text) <= 2 * _SHOWN:
        return text
    return f"{text[:_SHOWN]} [...] {text[-_SHOWN:]}"
