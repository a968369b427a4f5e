from __future__ import annotations

import pytest

from opensmp.base.sizes import parse_bytes
from opensmp.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("16GiB", 16 * 2**30),
        ("16GB", 16 * 10**9),
        ("512MiB", 512 * 2**20),
        ("512 mib", 512 * 2**20),
        (" 1.5kB ", 1500),
        ("0.5TiB", 2**39),
        (".5KiB", 512),
        ("100B", 100),
        ("4096", 4096),
    ],
)
def test_size_is_read(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("16G", ["'16G'", "16GiB", "16GB"]),
        ("16k", ["'16k'", "16KiB", "16kB"]),
        ("16GBi", ["'GBi' is not known", "KiB, MiB, GiB, TiB"]),
        ("16 apples", ["'apples' is not known", "KiB, MiB, GiB, TiB"]),
        ("GiB", ["'GiB'", "16GiB, 16GB or 512MiB"]),
        ("-1GiB", ["'-1GiB'", "16GiB, 16GB or 512MiB"]),
        ("1e9", ["'1e9'"]),
        ("", ["''", "16GiB, 16GB or 512MiB"]),
        ("0GiB", ["'0GiB'", "at least one byte"]),
        ("0.1B", ["'0.1B'", "at least one byte"]),
    ],
)
def test_size_that_cannot_be_read_says_what_to_write(text, parts):
    with pytest.raises(ConfigError, match="--device-memory: received") as caught:
        parse_bytes(text, "--device-memory")
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("text", ["9" * 400, "1." + "9" * 99 + "ZB", "\u0663", "2e18", "0.4"])
def test_amount_that_no_device_has_is_refused(text):
    with pytest.raises(ConfigError, match="which is no amount of memory") as caught:
        parse_bytes(text)
    assert len(str(caught.value)) < 300


def test_largest_amount_is_an_amount():
    assert parse_bytes("1048576 TiB") == 2**60
