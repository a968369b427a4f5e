from __future__ import annotations

import math

import pytest

from opensmp.base.message_text import shown
from opensmp.base.strict_json import JsonFault, NotJson, parse_json


def test_json_is_read():
    assert parse_json('{"a": [1, 2.5, null, true, "\\u00e9"]}') == {"a": [1, 2.5, None, True, "é"]}
    assert parse_json(b"[1e308]") == [1e308]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "line 1, column 1"),
        ('{"a": 1,\n b}', "line 2, column 2"),
        ("[1", "line 1"),
        ("NaN", "NaN is no JSON number"),
        ("[-Infinity]", "-Infinity is no JSON number"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_what_is_not_json_says_where(text, part):
    with pytest.raises(NotJson) as caught:
        parse_json(text)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
        ("9" * 5000, "too many digits"),
        ("[1e999]", "1e999 is too large"),
        ('[{"b": 1, "a": 1, "a": 1}]', "the key 'a' comes twice"),
    ],
    ids=shown,
)
def test_json_that_cannot_be_used_says_why(text, part):
    with pytest.raises(JsonFault) as caught:
        parse_json(text)
    assert not isinstance(caught.value, NotJson)
    assert part in str(caught.value)


def test_numbers_that_are_not_finite_are_taken_where_they_are_expected():
    nan, high, low, large = parse_json("[NaN, Infinity, -Infinity, 1e999]", nonfinite=True)
    assert math.isnan(nan)
    assert (high, low, large) == (math.inf, -math.inf, math.inf)
