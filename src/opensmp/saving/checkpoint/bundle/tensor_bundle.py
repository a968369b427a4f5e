"""Writes TensorFlow checkpoint files from one block of memory, bypassing the page cache.

A checkpoint in this format consists of a data file with the bytes of all values, and an index: a
LevelDB table (https://github.com/google/leveldb/blob/main/doc/table_format.md) from keys to
`BundleEntryProto` messages of `tensor_bundle.proto`. TensorFlow's `SaveV2` copies every byte
through two buffers on the CPU; here the disk reads directly from the memory (`O_DIRECT`).
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
_VARINT, _BYTES, _FIXED32 = 0, 2, 5  # protocol buffer wire types


class Entry(NamedTuple):
    """A value in the file.

    Attributes:
        name: Key of the value.
        dtype: TensorFlow's enum value of its dtype, `tf.DType.as_datatype_enum`.
        shape: Shape.
        offset: Offset of its bytes in the memory and in the file.
        size: Number of bytes.
    """

    name: str
    dtype: int
    shape: tuple[int, ...]
    offset: int
    size: int


def write_bundle(prefix: str, memory: Any, entries: Sequence[Entry]) -> None:
    """Writes values from `memory`, page-aligned pages of `uint8`, to files and flushes them."""
    size = max(entry.offset + entry.size for entry in entries)
    sums = [crc32c(memory[e.offset : e.offset + e.size]) for e in entries]
    _write_data(data_path(prefix), memory, size)
    path = index_path(prefix)
    path.write_bytes(table(_records(entries, sums)))
    to_disk(path)


def data_path(prefix: str) -> str:
    """The data file; an existing one is overwritten in place, which is faster."""
    return f"{prefix}.data-00000-of-00001"


def _write_data(path: str, memory: Any, size: int) -> None:
    """Writes the first `size` bytes with O_DIRECT if possible, and flushes them to disk."""
    pages = memoryview(memory)[: -(-size // PAGE_BYTES) * PAGE_BYTES]
    direct = getattr(os, "O_DIRECT", 0)
    file = _opened(path, direct)
    try:
        done = 0
        while done < len(pages):
            try:
                done += os.pwrite(file, pages[done : done + _WRITE_BYTES], done)
            except OSError as error:
                # Some file systems do not support O_DIRECT, or need another alignment.
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
    """Records of the index: the header under the empty key, and one entry per value."""
    version = _field(1, _VARINT, 1)
    records = [(b"", _field(1, _VARINT, 1) + _field(3, _BYTES, version))]  # one data file
    for entry, crc in zip(entries, sums, strict=True):
        dims = b"".join(_field(2, _BYTES, _field(1, _VARINT, size)) for size in entry.shape)
        record = _field(1, _VARINT, entry.dtype) + _field(2, _BYTES, dims)
        if entry.offset:
            record += _field(4, _VARINT, entry.offset)
        record += _field(5, _VARINT, entry.size) + _field(6, _FIXED32, masked(crc))
        records.append((entry.name.encode(), record))
    return sorted(records)


def _field(number: int, kind: int, value: Any) -> bytes:
    """Encodes a field of a protocol buffer."""
    if kind == _VARINT:
        text = varint(value)
    elif kind == _FIXED32:
        text = int(value).to_bytes(4, "little")
    else:
        text = varint(len(value)) + bytes(value)
    return varint(number << 3 | kind) + text
