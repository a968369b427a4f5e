from __future__ import annotations

import numpy as np
import pytest

from opensmp.saving.checkpoint.bundle.crc32c import crc32c, masked

# Of RFC 3720, appendix B.4.
KNOWN = {
    b"": 0,
    b"123456789": 0xE3069283,
    bytes(32): 0x8A9136AA,
    b"\xff" * 32: 0x62A8AB43,
    bytes(range(32)): 0x46DD794E,
    bytes(range(31, -1, -1)): 0x113FDB5C,
}


def bit_by_bit(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize(("data", "expected"), KNOWN.items())
def test_known_checksums(data, expected):
    assert crc32c(np.frombuffer(data, np.uint8)) == expected == bit_by_bit(data)


@pytest.mark.parametrize("size", [9780, 9781, 9782, 78_253, 200_001])
def test_bytes_that_are_shortened_keep_their_checksum(size):
    data = np.random.default_rng(size).integers(0, 256, size + 3, np.uint8)
    for begin in (0, 3):  # at any place in memory
        part = data[begin : begin + size]
        assert crc32c(part) == bit_by_bit(part.tobytes())
    before = data.copy()
    crc32c(data)
    np.testing.assert_array_equal(data, before)


def test_every_bit_of_a_large_array_counts():
    data = np.zeros(900_000, np.uint8)  # enough for all sizes of blocks
    sums = {crc32c(data)}
    for place in (0, 3, 4, 262_143, 262_144, 625_984, 899_999):
        data[place] ^= 0x10
        sums.add(crc32c(data))
        data[place] ^= 0x10
    assert len(sums) == 8


def test_masked_as_tensorflow_stores_it():
    assert masked(0) == 0xA282EAD8
    assert masked(0xE3069283) == (((0xE3069283 >> 15) | (0xE3069283 << 17)) + 0xA282EAD8) % 2**32
