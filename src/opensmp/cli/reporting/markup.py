"""Pieces of HTML and of text that several parts of a page use."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from typing import Any

from opensmp.cli.reporting.measured_step import Row


def escaped(value: object) -> str:
    """Text for HTML, also in attributes."""
    return html.escape(str(value))


def percent(share: float) -> str:
    """A share as text: `"31 %"`."""
    return f"{100 * share:.0f} %"


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
