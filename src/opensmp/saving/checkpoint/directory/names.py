"""File names of checkpoints."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path
from typing import NamedTuple

INDEX = ".index"
MANIFEST = ".manifest"
_DATA = r"\.data-[0-9]{5}-of-[0-9]{5}"
LARGEST_NUMBER = 10**18 - 1  # every number of that many digits fits into the save counter
_NUMBER = r"0|[1-9][0-9]{0,17}"  # as formatted by "%d": `ckpt-007` was not written by this class
_PATTERN_CHARACTERS = "[]*?\\"


class FileName(NamedTuple):
    """A parsed file name.

    Attributes:
        number: Number of the checkpoint.
        ending: Its suffix: `".index"`, `".manifest"`, a data suffix such as
            `".data-00000-of-00001"`, or `""`.
    """

    number: int
    ending: str


def parsed(file: str, name: str) -> FileName | None:
    """Parses a file name; None if it is not a file of a checkpoint of this name."""
    found = re.fullmatch(
        rf"{re.escape(name)}-({_NUMBER})({re.escape(INDEX)}|{re.escape(MANIFEST)}|{_DATA})?", file
    )
    return FileName(int(found[1]), found[2] or "") if found else None


def without_ending(path: str) -> str:
    """The prefix of a checkpoint, given the path of any of its files or the prefix itself."""
    return re.sub(rf"(?:{re.escape(INDEX)}|{re.escape(MANIFEST)}|{_DATA})\Z", "", path)


def is_data_ending(ending: str) -> bool:
    """Whether a string is the suffix of a data file."""
    return re.fullmatch(_DATA, ending) is not None


def index_path(prefix: str) -> Path:
    """The index file, which locates values in the data files; it makes the files a checkpoint."""
    return Path(prefix + INDEX)


def manifest_path(prefix: str) -> Path:
    """The manifest file of a checkpoint."""
    return Path(prefix + MANIFEST)


def data_files(prefix: str) -> list[Path]:
    """The existing data files of a checkpoint, sorted by name."""
    begin = len(os.path.basename(prefix))
    found = (Path(path) for path in glob.glob(f"{glob.escape(prefix)}.data-*"))
    return sorted(path for path in found if is_data_ending(path.name[begin:]) and path.is_file())


def is_pattern(text: str) -> bool:
    """Whether TensorFlow's readers may interpret a path as a glob pattern."""
    return any(character in text for character in _PATTERN_CHARACTERS)
