"""TensorFlow's files of a checkpoint, written from one block of memory past the page cache.

A checkpoint in this format is a file with the bytes of all values, and an index: a table of
LevelDB's format (https://github.com/google/leveldb/blob/main/doc/table_format.md) from the key of
a value to what `tensor_bundle.proto` calls a `BundleEntryProto`. `SaveV2` writes both, but every
byte goes through two buffers by the hands of a core; here the disk takes the bytes from where
they lie (`O_DIRECT`).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from opensmp.saving.atomic import to_disk
from opensmp.saving.checkpoint.bundle.crc32c import crc32c, masked
from opensmp.saving.checkpoint.bundle.leveldb_table import table, varint
from opensmp.saving.checkpoint.directory.names import index_path

PAGE_BYTES = 4096
_WRITE_BYTES = 16 << 20
_VARINT, _BYTES, _FIXED32 = 0, 2, 5  # wire types of protocol buffers


class Entry(NamedTuple):
    """A value in the file.

    Attributes:
        name: Its key.
        dtype: Number of its type in TensorFlow, `tf.DType.as_datatype_enum`.
        shape: Its shape.
        offset: Where in the memory, and in the file, its bytes begin.
        size: How many they are.
    """

    name: str
    dtype: int
    shape: tuple[int, ...]
    offset: int
    size: int


def write_bundle(prefix: str, memory: Any, entries: Sequence[Entry]) -> None:
    """Writes values to files, which are on the disk when it returns.

    Args:
        prefix: What the names of the files begin with.
        memory: The bytes of all values, an array of `uint8` that begins at a page of memory and
            consists of whole pages.
        entries: The values.

    Raises:
        OSError: The files cannot be written.
    """
    size = max(entry.offset + entry.size for entry in entries)
    sums = [crc32c(memory[e.offset : e.offset + e.size]) for e in entries]
    _write_data(data_path(prefix), memory, size)
    path = index_path(prefix)
    path.write_bytes(table(_records(entries, sums)))
    to_disk(path)


def data_path(prefix: str) -> str:
    """The file with the values. If there is one it is written over, which is quicker."""
    return f"{prefix}.data-00000-of-00001"


def _write_data(path: str, memory: Any, size: int) -> None:
    pages = memoryview(memory)[: -(-size // PAGE_BYTES) * PAGE_BYTES]
    direct = getattr(os, "O_DIRECT", 0)
    file = _opened(path, direct)
    try:
        done = 0
        while done < len(pages):
            try:
                done += os.pwrite(file, pages[done : done + _WRITE_BYTES], done)
            except OSError as error:
                # Some file systems cannot write so, or want other multiples than pages.
                if error.errno != errno.EINVAL or not direct:
                    raise
                os.close(file)
                direct = 0
                file = _opened(path, direct)
        os.ftruncate(file, size)
        os.fsync(file)
    finally:
        os.close(file)


def _opened(path: str, flag: int) -> int:
    flags = os.O_WRONLY | os.O_CREAT
    try:
        return os.open(path, flags | flag, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL or not flag:
            raise
        return os.open(path, flags, 0o666)


# ----------------------------------------------------------------------------- the index


def _records(entries: Sequence[Entry], sums: Sequence[int]) -> list[tuple[bytes, bytes]]:
    """Keys and values of the index: the header, which has no key, and an entry for each value."""
    version = _field(1, _VARINT, 1)
    records = [(b"", _field(1, _VARINT, 1) + _field(3, _BYTES, version))]  # one file of data
    for entry, crc in zip(entries, sums, strict=True):
        dims = b"".join(_field(2, _BYTES, _field(1, _VARINT, size)) for size in entry.shape)
        record = _field(1, _VARINT, entry.dtype) + _field(2, _BYTES, dims)
        if entry.offset:
            record += _field(4, _VARINT, entry.offset)
        record += _field(5, _VARINT, entry.size) + _field(6, _FIXED32, masked(crc))
        records.append((entry.name.encode(), record))
    return sorted(records)


def _field(number: int, kind: int, value: Any) -> bytes:
    """A field of a protocol buffer."""
    if kind == _VARINT:
        text = varint(value)
    elif kind == _FIXED32:
        text = int(value).to_bytes(4, "little")
    else:
        text = varint(len(value)) + bytes(value)
    return varint(number << 3 | kind) + text
