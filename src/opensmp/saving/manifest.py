"""The list of a checkpoint's files beside it, by which torn files are recognised."""

from __future__ import annotations

import glob
import json
import os
import zlib
from pathlib import Path
from typing import Any

_FORMAT = 1
_SUFFIX = ".manifest"


def manifest_path(prefix: str) -> Path:
    """Where the manifest of a checkpoint is."""
    return Path(prefix + _SUFFIX)


def data_files(prefix: str) -> list[Path]:
    """The files with the values of a checkpoint, by name."""
    return sorted(Path(path) for path in glob.glob(glob.escape(prefix) + ".data-?????-of-?????"))


def index_path(prefix: str) -> Path:
    """The file that says where in the others each value is; there is none without it."""
    return Path(prefix + ".index")


def write_manifest(prefix: str) -> None:
    """Writes the manifest of a checkpoint whose files are complete.

    The files with the values are listed with their sizes. Checksums of the values are in the
    index, in TensorFlow's format, so that a checksum of the index is enough.
    """
    index = index_path(prefix)
    record = {
        "format": _FORMAT,
        "bytes": {_suffix(path, prefix): path.stat().st_size for path in data_files(prefix)},
        "index": {"bytes": index.stat().st_size, "crc32": _crc32(index)},
    }
    manifest_path(prefix).write_text(json.dumps(record, indent=1) + "\n")


def fault(prefix: str) -> str | None:
    """What is wrong with the files of a checkpoint; None if nothing is, as far as sizes tell.

    Files without a manifest, as plain TensorFlow writes them, must be there all. Somebody may
    remove the checkpoint meanwhile: then it is one whose files are missing.

    Args:
        prefix: That of the checkpoint.

    Example:
        ```python
        fault("/opt/ml/checkpoints/ckpt-3")  # "ckpt-3.data-00000-of-00001 has 10 bytes, not 80"
        ```
    """
    index, files = index_path(prefix), data_files(prefix)
    if not index.is_file():
        return f"there is no file {index.name}"
    if not files:
        return "it has no file with values"
    try:
        record: dict[str, Any] = json.loads(manifest_path(prefix).read_text())
        expected = {str(suffix): int(size) for suffix, size in record["bytes"].items()}
        index_bytes, crc32 = int(record["index"]["bytes"]), int(record["index"]["crc32"])
    except FileNotFoundError:
        wanted = int(files[0].name.rsplit("-", 1)[1])
        return None if len(files) == wanted else f"{len(files)} of {wanted} data files are there"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{manifest_path(prefix).name} cannot be read"
    name = os.path.basename(prefix)
    for suffix, size in expected.items():
        path = Path(prefix + suffix)
        found = _size(path)
        if found != size:
            is_there = "is missing" if found is None else f"has {found} bytes, not {size}"
            return f"{name}{suffix} {is_there}"
    try:
        content = index.read_bytes()
    except FileNotFoundError:
        return f"there is no file {index.name}"
    if len(content) != index_bytes:
        return f"{index.name} has {len(content)} bytes, not {index_bytes}"
    if zlib.crc32(content) != crc32:
        return f"the checksum of {index.name} is wrong"
    return None


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size if path.is_file() else None
    except FileNotFoundError:
        return None


def _suffix(path: Path, prefix: str) -> str:
    return path.name[len(os.path.basename(prefix)) :]


def _crc32(path: Path) -> int:
    return zlib.crc32(path.read_bytes())
