"""Manifests: sizes and checksums of a checkpoint's files, to detect damage."""

from __future__ import annotations

import json
import math
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from opensmp.saving.atomic import to_disk
from opensmp.saving.checkpoint.bundle.leveldb_table import table_fault
from opensmp.saving.checkpoint.directory.names import (
    data_files,
    index_path,
    is_data_ending,
    manifest_path,
)

_FORMAT = 1
_LARGEST_BYTES = 1 << 24  # enough for a hundred thousand data files


class History(NamedTuple):
    """Metadata of a checkpoint, used if the state file is missing.

    Attributes:
        time: When it was saved, in seconds since 1970.
        after: Name of the newest checkpoint at that time; None if there was none.
        last_preserved: `last_preserved_timestamp` of the state file at that time.
        preserved: Whether `keep_checkpoint_every_n_hours` preserves it permanently.
    """

    time: float
    after: str | None
    last_preserved: float
    preserved: bool = False


class _Manifest(NamedTuple):
    """A parsed manifest: data file sizes by suffix, size and CRC-32 of the index, the history."""

    sizes: dict[str, int]
    index_bytes: int
    crc32: int
    history: History | None


def write_manifest(prefix: str, history: History | None = None) -> None:
    """Writes the manifest of a checkpoint whose files are complete.

    Data files are listed with their sizes. The index has checksums of the values, in TensorFlow's
    format, so that a checksum of the index suffices.
    """
    index = index_path(prefix)
    record: dict[str, Any] = {
        "format": _FORMAT,
        "bytes": {_suffix(path, prefix): path.stat().st_size for path in data_files(prefix)},
        "index": {"bytes": index.stat().st_size, "crc32": zlib.crc32(index.read_bytes())},
    }
    if history is not None:
        record["history"] = history._asdict()
    manifest_path(prefix).write_text(json.dumps(record, indent=1) + "\n")


def history_of(prefix: str) -> History | None:
    """Metadata of a checkpoint; None if it has no readable manifest.

    Manifests of earlier versions have no history: the time is then that of the file, and the name
    of the previous checkpoint is unknown, `""`.
    """
    try:
        manifest = _read(prefix)
        if manifest.history is not None:
            return manifest.history
        return History(manifest_path(prefix).stat().st_mtime, "", 0.0)
    except (OSError, ValueError):
        return None


def mark_preserved(prefix: str, scratch: str) -> None:
    """Marks a checkpoint as preserved in its manifest, which is first written to `scratch`."""
    path = manifest_path(prefix)
    _read(prefix)
    record = json.loads(path.read_text())
    known = history_of(prefix)
    assert known is not None
    record["history"] = known._replace(preserved=True)._asdict()
    new = Path(scratch, path.name)
    new.write_text(json.dumps(record, indent=1) + "\n")
    to_disk(new)
    os.replace(new, path)


def fault(prefix: str) -> str | None:
    """What is wrong with the files of a checkpoint; None if sizes and the index are correct.

    Without a manifest, as from plain TensorFlow, all data files must exist. If the checkpoint is
    removed concurrently, its files count as missing.
    """
    index, files = index_path(prefix), data_files(prefix)
    if not index.is_file():
        return f"there is no file {index.name}"
    if not files:
        return "it has no file with values"
    try:
        manifest: _Manifest | None = _read(prefix)
    except FileNotFoundError:
        manifest = None
        wanted = int(files[0].name.rsplit("-", 1)[1])
        if len(files) != wanted:
            return f"{len(files)} of {wanted} data files are there"
    except (OSError, ValueError) as error:
        return f"{manifest_path(prefix).name} cannot be read: {_short(error)}"
    name = os.path.basename(prefix)
    for suffix, size in (manifest.sizes if manifest else {}).items():
        path = Path(prefix + suffix)
        found = _size(path)
        if found != size:
            is_there = "is missing" if found is None else f"has {found} bytes, not {size}"
            return f"{name}{suffix} {is_there}"
    try:
        content = index.read_bytes()
    except FileNotFoundError:
        return f"there is no file {index.name}"
    except OSError as error:
        return f"{index.name} cannot be read: {_short(error)}"
    if manifest is None:
        # TensorFlow's reader allocates as much memory as the footer says.
        wrong = table_fault(content)
        return None if wrong is None else f"{index.name} {wrong}"
    if len(content) != manifest.index_bytes:
        return f"{index.name} has {len(content)} bytes, not {manifest.index_bytes}"
    if zlib.crc32(content) != manifest.crc32:
        return f"the checksum of {index.name} is wrong"
    return None


def _read(prefix: str) -> _Manifest:
    """The manifest of a checkpoint."""
    path = manifest_path(prefix)
    with open(path, "rb") as file:
        text = file.read(_LARGEST_BYTES + 1)
    if len(text) > _LARGEST_BYTES:
        raise ValueError(f"it has more than {_LARGEST_BYTES} bytes")
    try:
        record: Any = json.loads(text)
        sizes = {str(suffix): int(size) for suffix, size in record["bytes"].items()}
        index_bytes, crc32 = int(record["index"]["bytes"]), int(record["index"]["crc32"])
        known = record.get("history")
        history = None if known is None else _history(known)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as e:
        raise ValueError(f"it is no manifest ({_short(e)})") from e
    odd = [suffix for suffix in sizes if not is_data_ending(suffix)]
    if odd or not sizes:
        raise ValueError(f"it has no files with values, or others: {', '.join(odd)[:80]}")
    return _Manifest(sizes, index_bytes, crc32, history)


def _history(record: Any) -> History:
    after = record["after"]
    history = History(
        float(record["time"]),
        None if after is None else str(after),
        float(record["last_preserved"]),
        bool(record["preserved"]),
    )
    if not (math.isfinite(history.time) and math.isfinite(history.last_preserved)):
        raise ValueError("a time is not finite")
    return history


def _short(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"{type(error).__name__}: {text[:120]}"


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size if path.is_file() else None
    except FileNotFoundError:
        return None


def _suffix(path: Path, prefix: str) -> str:
    return path.name[len(os.path.basename(prefix)) :]
