"""Tables in LevelDB's format, in which TensorFlow writes the index of a checkpoint.

https://github.com/google/leveldb/blob/main/doc/table_format.md
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from opensmp.saving.checkpoint.bundle.crc32c import crc32c, masked

_MAGIC = 0xDB4775248B80FB57
_TRAILER_BYTES = 5  # per block: compression type and checksum
_FOOTER_BYTES = 48
_LONGEST_VARINT_BYTES = 10


def varint(value: int) -> bytes:
    """Encodes an integer in groups of seven bits, lowest first."""
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


def table(records: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Encodes sorted key-value records, at least one, as a table with one data block."""
    data = _block(records)
    other = _block([])
    where = varint(0) + varint(len(data) - _TRAILER_BYTES)
    index = _block([(records[-1][0], where)])
    footer = varint(len(data)) + varint(len(other) - _TRAILER_BYTES)
    footer += varint(len(data) + len(other)) + varint(len(index) - _TRAILER_BYTES)
    return data + other + index + footer.ljust(40, b"\0") + _MAGIC.to_bytes(8, "little")


def table_fault(content: bytes) -> str | None:
    """What is wrong with the footer of a table (the bytes of the file); None if it is valid.

    The footer has the offsets and sizes of blocks and no checksum; everything else has checksums.
    """
    footer = content[-_FOOTER_BYTES:]
    if len(footer) < _FOOTER_BYTES or int.from_bytes(footer[-8:], "little") != _MAGIC:
        return "does not end as an index does"
    numbers: list[int] = []
    at = 0
    for _ in range(4):
        value = 0
        for shift in range(_LONGEST_VARINT_BYTES):
            byte = footer[at]
            at += 1
            value |= (byte & 0x7F) << 7 * shift
            if byte < 0x80:
                break
        numbers.append(value)
    room = len(content) - _FOOTER_BYTES
    for offset, size in (numbers[:2], numbers[2:]):
        if offset + size + _TRAILER_BYTES > room:
            return f"has a block of {size} bytes at byte {offset}, but only {room} bytes"
    return None


def _block(records: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Encodes a block: records, restart offsets, their number, compression type and checksum."""
    text = bytearray()
    starts = []
    for key, value in records:
        starts.append(len(text))
        text += varint(0) + varint(len(key)) + varint(len(value)) + key + value
    for number in (*(starts or [0]), len(starts or [0])):
        text += number.to_bytes(4, "little")
    text += b"\0"  # uncompressed
    return bytes(text) + masked(crc32c(np.frombuffer(text, np.uint8))).to_bytes(4, "little")
