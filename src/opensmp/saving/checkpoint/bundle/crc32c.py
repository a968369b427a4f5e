"""CRC-32C, the checksum of values in checkpoints, of large arrays and without other threads.

TensorFlow computes it while it writes, and has no call for it alone. Here a checksum is the
remainder of the bytes, taken as a polynomial over the two-element field, by the polynomial of the
checksum. The remainder does not change when the beginning is replaced by what it is congruent to.
A multiple of the polynomial with four terms, x^5685 + x^1362 + x^426 + 1, says so for single bits,
and with all its exponents times a power of two for blocks of bits: a block is added (exclusive or)
to the blocks 4323, 5259 and 5685 places after it. That is all it takes to shorten an array to a
few thousand blocks, whatever its length; and NumPy adds blocks as fast as the memory gives them.

The method is that of S. Russell, "Chorba: A Novel CRC32 Implementation", arXiv:2412.16398 (2024),
with a multiple of few terms for this polynomial, found by a search of all up to degree 7000.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_REFLECTED = 0x82F63B78  # the polynomial of Castagnoli, lowest bit first
_LAGS = (4323, 5259, 5685)
_CHUNK = 4096  # blocks at a time: no more than the smallest lag
_RING = 3 * _CHUNK  # at least the largest lag and one chunk, and whole chunks
_BLOCK_BYTES = (64, 8, 1)  # the state for 64 lies in the second cache of a core
_MASK = 0xFFFFFFFF


def crc32c(data: Any) -> int:
    """The checksum of an array's bytes.

    Args:
        data: Contiguous bytes, as an array of `uint8`. It is quickest if they begin at a multiple
            of 8 bytes in memory.

    Example:
        ```python
        crc32c(np.frombuffer(b"123456789", np.uint8))  # 0xE3069283
        ```
    """
    begun = False
    for block in _BLOCK_BYTES:
        rounds = max(0, data.size // block - _LAGS[-1]) // _CHUNK
        if rounds:
            data, begun = _shortened(data, block, rounds, begun), True
    return _rest(data.tobytes(), 0 if begun else _MASK) ^ _MASK


def masked(crc: int) -> int:
    """A checksum as TensorFlow stores it, so that checksums of checksums mean something."""
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & _MASK


def _shortened(data: Any, block: int, rounds: int, begun: bool) -> Any:
    """The end of some bytes, with what stood before it added to it.

    Args:
        data: The bytes.
        block: Bytes of a block.
        rounds: How many chunks to take away.
        begun: Whether the ones that a checksum begins with have been added.
    """
    step = _CHUNK * block
    ring = np.zeros(_RING * block, np.uint8)
    lags = [lag * block for lag in _LAGS]
    for begin in range(0, rounds * step, step):
        chunk = data[begin : begin + step]
        if not begin and not begun:
            chunk = chunk.copy()
            chunk[:4] ^= 0xFF
        place = begin % ring.size
        out = ring[place : place + step]
        _add(chunk, ring, place - lags[0], out)
        for lag in lags[1:]:
            _add(out, ring, place - lag, out)
    end = rounds * step
    rest = data[end:].copy()
    for lag in lags:
        _add(rest[:lag], ring, end - lag, rest[:lag])
    return rest


def _add(array: Any, ring: Any, place: int, out: Any) -> None:
    """Writes the sum of an array and of what stands at a place of a ring."""
    place %= ring.size
    cut = min(array.size, ring.size - place)
    for part, at in ((slice(0, cut), place), (slice(cut, array.size), 0)):
        size = part.stop - part.start
        if size:
            _xor(array[part], ring[at : at + size], out[part])


def _xor(one: Any, other: Any, out: Any) -> None:
    if one.size % 8 == 0:
        one, other, out = one.view(np.uint64), other.view(np.uint64), out.view(np.uint64)
    np.bitwise_xor(one, other, out=out)


def _rest(data: bytes, crc: int) -> int:
    """The remainder of a few bytes after others."""
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc


def _table() -> list[int]:
    table = []
    for crc in range(256):
        for _ in range(8):
            crc = (crc >> 1) ^ (_REFLECTED if crc & 1 else 0)
        table.append(crc)
    return table


_TABLE = _table()
