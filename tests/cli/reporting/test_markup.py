from __future__ import annotations

import json

import pytest

from opensmp.cli.reporting.markup import duration, escaped, json_in_html


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0125, "12.5 ms"),
        (59.9, "59.9 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
        (3 * 86400 + 4 * 3600, "3 d 4 h"),
    ],
)
def test_durations_of_any_length_are_short(seconds, text):
    assert duration(seconds) == text


def test_json_cannot_end_its_element():
    value = {"</script><!--": "<&>"}
    text = json_in_html(value)
    assert not set("<>&") & set(text)
    assert json.loads(text) == value


def test_text_is_escaped_for_attributes_too():
    assert escaped("<a href=\"x\" 'y'>&") == "&lt;a href=&quot;x&quot; &#x27;y&#x27;&gt;&amp;"
