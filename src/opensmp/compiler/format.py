"""Formats bytes, seconds, counts and long names for people."""

from __future__ import annotations

import math


def format_bytes(size: float) -> str:
    """Formats bytes with about three significant digits: `"1.5 GiB"`."""
    if abs(size) < 1024:
        return f"{size:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        size /= 1024
        # 1023.7 would be printed as 1024, so it moves on to the next unit.
        if abs(size) < 1023.5 or unit == "TiB":
            break
    return f"{_three_digits(size)} {unit}"


def format_seconds(seconds: float) -> str:
    """Formats seconds with about three significant digits: `"12.5 ms"`."""
    if seconds == 0:
        return "0 s"
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if abs(seconds) * factor >= 0.9995:
            return f"{_three_digits(seconds * factor)} {unit}"
    return f"{_three_digits(seconds * 1e9)} ns"


def format_count(count: float) -> str:
    """Formats a large number with a unit prefix: `"25.6 M"`."""
    if abs(count) < 999.5:
        return f"{count:.0f}"
    for unit in ("k", "M", "G", "T", "P"):
        count /= 1000
        if abs(count) < 999.5 or unit == "P":
            break
    return f"{_three_digits(count)} {unit}"


def format_change(new: float, old: float) -> str:
    """Formats a relative change in percent: `"+1.6 %"`."""
    if new == old:
        return "±0 %"
    if old == 0:
        return "from 0"
    change = 100 * (new / old - 1)
    return f"{change:+.1f} %" if abs(change) >= 0.05 else "±0.0 %"


def shortened(name: str, longest: int = 26) -> str:
    """Shortens a long name in the middle; its end, the more specific part, keeps more."""
    if len(name) <= longest:
        return name
    tail = (longest - 1) * 2 // 3
    return f"{name[: longest - 1 - tail]}…{name[-tail:]}"


def _three_digits(value: float) -> str:
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    text = f"{value:.{min(max(digits, 0), 2)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
