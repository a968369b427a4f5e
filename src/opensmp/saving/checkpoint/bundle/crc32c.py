"""CRC-32C, the checksum of values in checkpoints, for large arrays and on a single thread.

TensorFlow computes it while writing and has no separate function for it. A checksum is the
remainder of the bytes, taken as a polynomial over GF(2), modulo the polynomial of the checksum. The
remainder does not change if leading bits are replaced by congruent ones. A multiple of the
polynomial with four terms, x^5685 + x^1362 + x^426 + 1, gives such a replacement for single bits,
and with all exponents multiplied by a power of two for blocks of bits: a block is XORed into the
blocks 4323, 5259 and 5685 positions after it. This reduces an array of any length to a few thousand
blocks, and NumPy XORs blocks at memory bandwidth.

The method is that of S. Russell, "Chorba: A Novel CRC32 Implementation", arXiv:2412.16398 (2024),
with a sparse multiple for this polynomial, found by an exhaustive search up to degree 7000.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_REFLECTED = 0x82F63B78  # the Castagnoli polynomial, lowest bit first
_LAGS = (4323, 5259, 5685)
_CHUNK = 4096  # blocks per iteration: at most the smallest lag
_RING = 3 * _CHUNK  # at least the largest lag and one chunk, and a multiple of the chunk
_BLOCK_BYTES = (64, 8, 1)  # the state for 64 fits into a core's L2 cache
_MASK = 0xFFFFFFFF


def crc32c(data: Any) -> int:
    """CRC-32C of a contiguous `uint8` array; fastest if it is aligned to 8 bytes."""
    begun = False
    for block in _BLOCK_BYTES:
        rounds = max(0, data.size // block - _LAGS[-1]) // _CHUNK
        if rounds:
            data, begun = _shortened(data, block, rounds, begun), True
    return _rest(data.tobytes(), 0 if begun else _MASK) ^ _MASK


def masked(crc: int) -> int:
    """Masks a checksum as TensorFlow stores it, so that stored checksums can be checksummed."""
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & _MASK


def _shortened(data: Any, block: int, rounds: int, begun: bool) -> Any:
    """The rest of the bytes after the first chunks of `block` bytes, with these folded into it."""
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
    """Writes the XOR of an array and of the ring buffer's contents at `place` to `out`."""
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
    """Continues the checksum `crc` with a few bytes, one at a time."""
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
