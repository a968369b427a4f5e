"""Line charts and bars as HTML that fits any width, without scripts."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence

_POINTS = 500
_COLOURS = 6

Points = Sequence[tuple[float, float]]


def line_chart(series: Mapping[str, Points], shown: Callable[[float], str], label: str) -> str:
    """Draws series over the number of the step, with gaps and red marks where values are odd.

    Args:
        series: Points (step, value) by name; values may be NaN or infinite.
        shown: Formats a value.
        label: What the chart shows, for those who do not see it.
    """
    finite = [v for points in series.values() for _, v in points if math.isfinite(v)]
    steps = [step for points in series.values() for step, _ in points]
    if not steps:
        return '<p class="faint">Nothing was measured.</p>'
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if low == high:
        low, high = low - abs(low or 1) / 2, high + abs(high or 1) / 2
    first, last = min(steps), max(steps)
    width = (last - first) or 1.0
    if first == last:
        first, width = first - 0.5, 1.0

    def place(step: float, value: float) -> str:
        return f"{1000 * (step - first) / width:.1f},{100 - 100 * (value - low) / (high - low):.2f}"

    lines, keys = [], []
    for number, (name, points) in enumerate(series.items()):
        hue = f"c{number % _COLOURS}"
        for run in _runs(thinned(points)):
            lines.append(f'<polyline class="{hue}" points="{" ".join(place(*p) for p in run)}"/>')
        odd = [step for step, value in points if not math.isfinite(value)]
        for step in dict.fromkeys(round(1000 * (step - first) / width) for step in odd):
            lines.append(f'<line class="odd" x1="{step}" x2="{step}" y1="0" y2="100"/>')
        note = " (red: not finite)" if odd else ""
        keys.append(f'<span><i class="key {hue}"></i>{html.escape(name)}{note}</span>')
    middle = (low + high) / 2
    scale = "".join(f"<span>{html.escape(shown(v))}</span>" for v in (high, middle, low))
    return (
        f'<figure class="chart"><div class="plot"><div class="scale">{scale}</div>'
        f'<svg role="img" aria-label="{html.escape(label)}" viewBox="0 0 1000 100" '
        f'preserveAspectRatio="none">{"".join(lines)}</svg></div>'
        f'<div class="steps"><span>step {min(steps):.0f}</span><span>{max(steps):.0f}</span></div>'
        f'<figcaption class="keys">{"".join(keys)}</figcaption></figure>'
    )


def bar(value: float, largest: float) -> str:
    """A bar for a table cell, as long as the share of `value` in `largest`."""
    share = 100 * value / largest if largest > 0 else 0.0
    return f'<div class="bar"><div style="width:{min(100.0, max(0.0, share)):.1f}%"></div></div>'


def thinned(points: Points) -> list[tuple[float, float]]:
    """Returns at most some hundred points: the means of neighbours, and all that are not finite."""
    size = -(-len(points) // _POINTS)
    if size <= 1:
        return list(points)
    found = []
    for begin in range(0, len(points), size):
        some = points[begin : begin + size]
        finite = [value for _, value in some if math.isfinite(value)]
        mean = math.fsum(finite) / len(finite) if len(finite) == len(some) else math.nan
        found.append((some[-1][0], mean))
    return found


def _runs(points: Points) -> list[Points]:
    """Splits points where values are not finite; a single point becomes a short line."""
    runs: list[list[tuple[float, float]]] = [[]]
    for step, value in points:
        if math.isfinite(value):
            runs[-1].append((step, value))
        else:
            runs.append([])
    return [run if len(run) > 1 else [run[0], run[0]] for run in runs if run]
