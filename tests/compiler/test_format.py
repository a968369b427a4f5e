from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opensmp.base.sizes import parse_bytes
from opensmp.compiler.format import (
    format_bytes,
    format_change,
    format_count,
    format_seconds,
    shortened,
)


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
