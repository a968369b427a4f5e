"""What a stranger hands over: right things with something wrong in them.

Random text finds nothing, since no parser looks past its first character. The strategies here
begin with a value that is right and put in what programs stumble over: other types, numbers at the
end of what is possible, texts that look like numbers, names that hardly anybody uses, great depth,
great length.

What is great is written small: `great("[", 100_000)` is drawn as a few choices, so that hypothesis
is quick and can make a failing case smaller.
"""

from __future__ import annotations

import copy
import json
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

Strategy = st.SearchStrategy[Any]

NUMBER_TEXTS = (
    *("0", "1", "2", "3", "4", "-1", "+1", "-0", "007", "1.0", "1.5", "1e3", "1_000", "0x10"),
    *("nan", "NaN", "inf", "-inf", "Infinity", "1e999", "1e-999", "65535", "65536", "2147483648"),
    *("9" * 19, "9" * 400, "9" * 5000, "-" + "9" * 5000, "1" + "0" * 4299, "1." + "0" * 5000),
    *("٣", "²", "½", "\uff11\uff12", "Ⅷ", "१", " 3 ", "3\n", "3\x00", "\t3", "3 4", "- 1", "--1"),
)
ODD_TEXTS = (
    *("", " ", "\n", "\x00", "a\x00b", "\ud800", "\udcff", "\ufeff", "\u202e", "é", "名", "🦆"),
    *("true", "false", "None", "null", "yes", "*", "**", "/", "//", "..", ".", "~", "-", "--"),
    *("[", "]", "[]", "][", "{", "}", "{}", "(", '"', "'", "\\", ",", ":", ";", "=", "%", "%s"),
    *("localhost", "::1", "[::1]:80", "[::1", "a:", ":1", "a:b:c", "a:0", "a:65536", "a b:1"),
    *("a..b:1", "1-", "{0}", "1,000", "interleaved", "speed", "cluster", "a" * 64 + ":1"),
    *("CPU:0", "GPU:0", "CPU:99999999999999999999", "cpu:٣", "CPU:-1", "/job:a/CPU:0", "CPU:0:0"),
    *("__class__", "constructor", "$HOME", "$(id)", "--help", "-n", "None:None"),
)
ODD_NUMBERS = (
    *(0, 1, -1, 2, 3, 255, 2**31 - 1, 2**31, -(2**31) - 1, 2**53 + 1, 2**63 - 1, 2**63, 2**64),
    *(10**9, 10**18, 10**400, -(10**400), 0.0, -0.0, 0.5, 1.0, 2.5, 1e300, -1e300, 5e-324),
    *(float("nan"), float("inf"), float("-inf")),
)
GREAT = (1_000, 50_000, 400_000)


# Not among the numbers above, since Python refuses to print it.
_HUGE = st.builds(lambda: 10**5000)


def great(texts: Sequence[str]) -> Strategy:
    """One of the texts so often that what is not linear takes minutes."""
    return st.builds(operator.mul, st.sampled_from(texts), st.sampled_from(GREAT))


def texts(*right: str) -> Strategy:
    """A text: one of the right ones, mutilated or not, or an odd one."""
    return st.one_of(
        *([st.sampled_from(right), mutilated(st.sampled_from(right))] if right else []),
        st.sampled_from(NUMBER_TEXTS),
        st.sampled_from(ODD_TEXTS),
        st.text(max_size=8),
        great(("[", "a", "9", "a,", "a/", "[1]", "_1", "\ud800", "\x00", " ", '{"a":', "-", "名")),
    )


@st.composite
def mutilated(draw: st.DrawFn, whole: Strategy) -> str:
    """A text of which a part is gone, doubled, or replaced by an odd one."""
    text: str = draw(whole)
    for _ in range(draw(st.integers(1, 2))):
        at, to = sorted((draw(st.integers(0, len(text))), draw(st.integers(0, len(text)))))
        if draw(st.booleans()):
            to = min(to, at + 2)  # a character or two; else anything up to the end
        middle = draw(
            st.sampled_from(("", text[at:to] * 2, text[at:to][::-1]))
            | st.sampled_from(NUMBER_TEXTS + ODD_TEXTS)
        )
        text = text[:at] + middle + text[to:]
    return text


def numbers() -> Strategy:
    """A number, whole or not, near nothing or far from everything."""
    return st.sampled_from(ODD_NUMBERS) | st.integers(-3, 12) | st.booleans() | _HUGE


def json_values(*right: Any) -> Strategy:
    """What JSON can say, and what Python's reader of JSON takes besides."""
    leaves = st.one_of(
        *([st.sampled_from(right)] if right else []),
        st.none(),
        numbers(),
        st.sampled_from(NUMBER_TEXTS + ODD_TEXTS),
        st.sampled_from(tuple(MARKS)),
    )
    return st.one_of(
        leaves,
        st.recursive(
            leaves,
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(ODD_TEXTS + NUMBER_TEXTS[:20]), inner, max_size=3)
            ),
            max_leaves=5,
        ),
    )


def nested(depth: int, kind: str = "list") -> Any:
    """Lists or dicts inside each other."""
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value}
    return value


_CHANGES = ("replace", "replace", "number", "remove", "copy", "wrap", "key")


@st.composite
def mutated(draw: st.DrawFn, whole: Strategy, odd: Strategy | None = None) -> Any:
    """A JSON value in which some parts are others.

    Args:
        draw: Of hypothesis.
        whole: What it is when it is right.
        odd: What may be put in; `json_values()` if not given.
    """
    value = copy.deepcopy(draw(whole))
    odd = _ODD_JSON if odd is None else odd
    for _ in range(draw(st.integers(0, 3))):
        places = [*_places(value)]
        if not places:
            return draw(odd)
        # A place near the root, or any: small parts are many, and would be all that is tried.
        near = places[: max(1, len(places) // 8)]
        holder, key = draw(st.sampled_from(near) | st.sampled_from(places))
        change = draw(st.sampled_from(_CHANGES))
        _change(draw, holder, key, change, odd, places)
    return value


def _change(
    draw: st.DrawFn, holder: Any, key: Any, change: str, odd: Strategy, places: list[Any]
) -> None:
    old = holder[key]
    if change == "number" and isinstance(old, int | float) and abs(old) < 2**70:
        holder[key] = draw(st.sampled_from((-old, old + 1, old - 1, float(old), str(old), [old])))
    elif change == "remove":
        del holder[key]
    elif change == "copy":  # the right thing in the wrong place, or once more
        other, at = draw(st.sampled_from(places))
        if isinstance(other, list):
            other.append(copy.deepcopy(old))
        elif at in other:
            other[at] = copy.deepcopy(old)
    elif change == "wrap":
        holder[key] = draw(st.sampled_from(([old], {"a": old}, [old, old])))
    elif change == "key" and isinstance(holder, dict):
        holder[draw(st.sampled_from(ODD_TEXTS) | mutilated(st.just(str(key))))] = holder.pop(key)
    else:
        holder[key] = draw(odd)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Where something can be put instead: pairs (list or dict, its index or key)."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    for holder in waiting:  # grows
        if isinstance(holder, dict):
            found += [(holder, key) for key in holder]
            waiting += holder.values()
        elif isinstance(holder, list):
            found += [(holder, index) for index in range(len(holder))]
            waiting += holder
    return found


# --- JSON as text -----------------------------------------------------------------------------

MARKS: Mapping[str, str] = {
    "@deep lists": "[" * 100_000 + "]" * 100_000,
    "@deep objects": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "@rather deep": "[" * 900 + "]" * 900,
    "@open lists": "[" * 100_000,
    "@digits": "9" * 5_000,
    "@many digits": "-" + "9" * 200_000,
    "@beyond": "1e999",
    "@long float": "0." + "1" * 100_000,
    "@twice": '{"a": 1, "a": 2}',
    "@nothing": "",
    "@comma": "[1,]",
    "@surrogate": '"\\ud800"',
    "@many": "[" + "0," * 100_000 + "0]",
    "@long": '"' + "a" * 300_000 + '"',
    "@nan": "NaN",
    "@minus": "-Infinity",
}
"""Texts of JSON that no value of Python can be written as, or only slowly."""


@st.composite
def json_texts(draw: st.DrawFn, value: Strategy) -> str:
    """The text of a value, in which marks are replaced and which may be mutilated.

    A key may come twice, which no value of Python can say.
    """
    try:
        text = json.dumps(draw(value), ensure_ascii=draw(st.booleans()))
    except ValueError:  # an integer that Python does not write
        text = json.dumps({"a": "@digits"})
    for mark, replacement in MARKS.items():
        text = text.replace(json.dumps(mark), replacement)
    way = draw(st.integers(0, 9))
    if way == 0:
        return draw(mutilated(st.just(text)))
    if way == 1 and text.startswith("{") and len(text) > 2:
        return text[:-1] + "," + text[1:]  # all keys twice
    if way == 2:
        return draw(st.sampled_from(("\ufeff", " \n", "//\n", "\x00"))) + text
    return text


@st.composite
def either(draw: st.DrawFn, right: Strategy, odd: Strategy) -> Any:
    """Mostly the right thing, sometimes an odd one: a case with ten faults tries only one."""
    return draw(odd if draw(st.integers(0, 5)) == 0 else right)


_ODD_JSON = json_values()  # made once, since hypothesis looks at a strategy before it draws
