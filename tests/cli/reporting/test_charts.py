from __future__ import annotations

import math
import re

from opensmp.cli.reporting.charts import bar, line_chart, thinned


def polylines(text):
    return [
        [tuple(map(float, pair.split(","))) for pair in points.split()]
        for points in re.findall(r'points="([^"]*)"', text)
    ]


def test_values_are_drawn_to_scale():
    (line,) = polylines(line_chart({"a": [(1, 0.0), (2, 5.0), (3, 10.0)]}, str, "a"))
    assert line == [(0, 100), (500, 50), (1000, 0)]


def test_a_line_is_interrupted_where_a_value_is_not_finite():
    text = line_chart({"a": [(1, 0.0), (2, math.nan), (3, 10.0)]}, str, "a")
    assert [len(line) for line in polylines(text)] == [2, 2]  # points, drawn as short lines
    assert text.count('class="odd"') == 1


def test_long_series_are_thinned_to_their_means_and_keep_odd_values():
    points = [(i, float(i % 2)) for i in range(10_000)]
    points[7_777] = (7_777, math.inf)
    found = thinned(points)
    assert len(found) <= 500
    assert sum(not math.isfinite(value) for _, value in found) == 1
    assert all(value == 0.5 for _, value in found if math.isfinite(value))
    assert found[-1][0] == 9_999


def test_nothing_measured_is_said():
    assert "Nothing was measured" in line_chart({}, str, "a")


def test_bars_stay_within_their_cell():
    assert "width:50.0%" in bar(1, 2)
    assert "width:100.0%" in bar(3, 2)
    assert "width:0.0%" in bar(1, 0)
