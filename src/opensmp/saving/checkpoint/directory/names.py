"""Names of the files of a checkpoint."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path
from typing import NamedTuple

INDEX = ".index"
MANIFEST = ".manifest"
_DATA = r"\.data-[0-9]{5}-of-[0-9]{5}"
LARGEST_NUMBER = 10**18 - 1  # of those that all fit into the save counter
_NUMBER = r"0|[1-9][0-9]{0,17}"  # as "%d" writes it: `ckpt-007` is a name that somebody else gave
_PATTERN_CHARACTERS = "[]*?\\"


class FileName(NamedTuple):
    """What the name of a file says.

    Attributes:
        number: Number of the checkpoint.
        ending: `".index"`, `".manifest"`, such as `".data-00000-of-00001"`, or `""`.
    """

    number: int
    ending: str


def parsed(file: str, name: str) -> FileName | None:
    """Takes the name of a file apart; None if it is no file of a checkpoint of this name.

    Args:
        file: The name of the file, without directories.
        name: What the names of the checkpoints begin with.

    Example:
        ```python
        parsed("ckpt-12.index", "ckpt")  # FileName(number=12, ending=".index")
        parsed("ckpt-best-3.index", "ckpt")  # None
        ```
    """
    found = re.fullmatch(
        rf"{re.escape(name)}-({_NUMBER})({re.escape(INDEX)}|{re.escape(MANIFEST)}|{_DATA})?", file
    )
    return FileName(int(found[1]), found[2] or "") if found else None


def without_ending(path: str) -> str:
    """The path of a checkpoint, given that of any of its files, or itself."""
    return re.sub(rf"(?:{re.escape(INDEX)}|{re.escape(MANIFEST)}|{_DATA})\Z", "", path)


def is_data_ending(ending: str) -> bool:
    """Whether a text is the ending of a file with values."""
    return re.fullmatch(_DATA, ending) is not None


def index_path(prefix: str) -> Path:
    """The file that says where in the others each value is; there is no checkpoint without it."""
    return Path(prefix + INDEX)


def manifest_path(prefix: str) -> Path:
    """Where the manifest of a checkpoint is."""
    return Path(prefix + MANIFEST)


def data_files(prefix: str) -> list[Path]:
    """The files with the values of a checkpoint, by name."""
    begin = len(os.path.basename(prefix))
    found = (Path(path) for path in glob.glob(f"{glob.escape(prefix)}.data-*"))
    return sorted(path for path in found if is_data_ending(path.name[begin:]) and path.is_file())


def is_pattern(text: str) -> bool:
    """Whether TensorFlow's readers may take a path for a pattern of several paths."""
    return any(character in text for character in _PATTERN_CHARACTERS)
