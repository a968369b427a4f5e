"""Validates and reads the ZIP archives of `.keras` files."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import zipfile
from collections.abc import Iterator
from typing import Any

from opensmp.base.types import PathLike
from opensmp.errors import SavingError
from opensmp.saving.models.inspection.damage import explained, half

CONFIG, WEIGHTS = "config.json", "model.weights.h5"

# Keras does not compress; recompressed files rarely exceed this ratio.
_MOST_EXPANSION = 100
_FLOOR_BYTES = 64 << 20
_PIECE_BYTES = 1 << 20
_KINDS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_LENGTHS, _HEADER = 26, 30  # in a local file header, ZIP specification 4.3.7


def check_archive(path: PathLike, what: str) -> set[str]:
    """Reads a whole archive once and verifies its checksums; returns the member names.

    Keras itself accepts weights with a wrong checksum.
    """
    with explained(path, what), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        for info in members:
            fault = _fault(info)
            if fault:
                raise SavingError(_refusal(path, what, f"its part {info.filename!r} {fault}"))
        total = sum(info.file_size for info in members)
        if total > max(_FLOOR_BYTES, _MOST_EXPANSION * os.path.getsize(path)):
            raise SavingError(_refusal(path, what, f"unpacked it would be {total:,} bytes"))
        for info in members:
            with archive.open(info) as member:
                while member.read(_PIECE_BYTES):
                    pass
        return {info.filename for info in members}


def _fault(info: zipfile.ZipInfo) -> str | None:
    name = info.filename.replace("\\", "/")
    if name.startswith("/") or ".." in name.split("/"):
        return "lies outside of the archive"
    if info.flag_bits & 1:
        return "is encrypted"
    if info.compress_type not in _KINDS:
        return "is packed in a way that is not read; expected: stored or deflated"
    if info.file_size > max(_FLOOR_BYTES, _MOST_EXPANSION * info.compress_size):
        return f"would be {info.file_size:,} bytes, of which {info.compress_size:,} are stored"
    return None


def _refusal(path: PathLike, what: str, why: str) -> str:
    return (
        f"{what}: {os.fspath(path)} is not read: {why}. Keras writes no such files; ask for "
        "another one, from somebody you trust."
    )


def read_member(path: PathLike, name: str, what: str) -> bytes:
    """Contents of a small member of a validated archive."""
    with explained(path, what), zipfile.ZipFile(path) as archive:
        if name not in archive.namelist():
            raise SavingError(half(path, what, f"{name} is missing in it"))
        return archive.read(name)


@contextlib.contextmanager
def opened_member(path: PathLike, name: str) -> Iterator[Any]:
    """Opens a member for random access, which zipfile does not support efficiently."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED:
            yield io.BytesIO(archive.read(name))
            return
    with open(path, "rb") as file:
        file.seek(info.header_offset + _LENGTHS)
        lengths = struct.unpack("<HH", file.read(4))  # of the name and of the extra field
        yield _Window(file, info.header_offset + _HEADER + sum(lengths), info.file_size)


class _Window(io.RawIOBase):
    """A read-only view of a byte range of a file."""

    def __init__(self, file: Any, begin: int, size: int) -> None:
        self._file, self._begin, self._size, self._at = file, begin, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = origin + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._begin + self._at)
        data = self._file.read(max(0, min(len(buffer), self._size - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
