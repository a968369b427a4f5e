"""Pieces of HTML and of text that several parts of a page use."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from typing import Any

from opensmp.cli.reporting.measured_step import Row
from opensmp.compiler.format import format_seconds


def escaped(value: object) -> str:
    """Text for HTML, also in attributes."""
    return html.escape(str(value))


def percent(share: float) -> str:
    """A share as text: `"31 %"`."""
    return f"{100 * share:.0f} %"


def duration(seconds: float) -> str:
    """A time of any length: `"12.5 ms"`, `"3 min 20 s"`, `"2 h 5 min"`, `"3 d 4 h"`."""
    whole = int(seconds)
    for unit, name, smaller, its in ((86400, "d", 3600, "h"), (3600, "h", 60, "min")):
        if whole >= unit:
            return f"{whole // unit} {name} {whole % unit // smaller} {its}"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else format_seconds(seconds)


def or_dash(value: Any, shown: Callable[[Any], str]) -> str:
    """A value as text, or a dash where there is none."""
    return "-" if value is None else shown(value)


def row_name(row: Row, several: bool) -> str:
    """Name of a partition, with its replica if there are several."""
    return f"{row.replica} / {row.partition}" if several else f"partition {row.partition}"


def json_in_html(data: object) -> str:
    """JSON that cannot end the element that it is in."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text
