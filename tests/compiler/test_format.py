from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opensmp.compiler.format import (
    format_bytes,
    format_change,
    format_count,
    format_seconds,
    parse_bytes,
    shortened,
)
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


@given(st.integers(1, 2**50))
def test_shown_size_is_within_half_a_percent(size):
    text = format_bytes(size)
    assert parse_bytes(text) == pytest.approx(size, rel=0.005)
    assert len(text) <= 8


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (format_bytes(0), "0 B"),
        (format_bytes(1023.7 * 2**20), "1 GiB"),
        (format_bytes(2**50), "1024 TiB"),
        (format_seconds(0), "0 s"),
        (format_seconds(0.0125), "12.5 ms"),
        (format_seconds(3e-10), "0.3 ns"),
        (format_seconds(0.99996), "1 s"),
        (format_count(999), "999"),
        (format_count(999.7), "1 k"),
        (format_count(25_610_000), "25.6 M"),
        (format_count(4e18), "4000 P"),
        (format_change(103, 100), "+3.0 %"),
        (format_change(97, 100), "-3.0 %"),
        (format_change(100.001, 100), "±0.0 %"),
        (format_change(5, 5), "±0 %"),
        (format_change(5, 0), "from 0"),
    ],
)
def test_quantity_is_shown(shown, expected):
    assert shown == expected


@given(st.text(max_size=60), st.integers(4, 40))
def test_shortened_name_keeps_its_end_within_the_length(name, longest):
    short = shortened(name, longest)
    assert len(short) <= max(longest, 0) or short == name
    assert short == name or (len(short) == longest and name.endswith(short.rpartition("…")[2]))


@pytest.mark.parametrize("text", ["9" * 400, "1." + "9" * 99 + "ZB", "\u0663", "2e18", "0.4"])
def test_amount_that_no_device_has_is_refused(text):
    with pytest.raises(ConfigError, match="which is no amount of memory") as caught:
        parse_bytes(text)
    assert len(str(caught.value)) < 300


def test_largest_amount_is_an_amount():
    assert parse_bytes("1048576 TiB") == 2**60
