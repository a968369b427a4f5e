"""Formats untrusted values and lists of faults for error messages, with bounded length and time."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

MOST_FAULTS = 50
"""Maximum number of faults listed in one message; the number of omitted ones is stated."""

_DEEPEST = 6
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]{1,60}")
_MOST_NAMES = 2_000
_LONGEST_NAME = 100
_BRACKETS: dict[type, tuple[str, str]] = {
    list: ("[", "]"),
    tuple: ("(", ")"),
    set: ("{", "}"),
    frozenset: ("frozenset({", "})"),
    dict: ("{", "}"),
}


def shown(value: Any, most: int = 80) -> str:
    """Returns `repr(value)` cut off at `most` characters; never raises, runs in bounded time."""
    text = ""
    # A list may have millions of items or contain itself, so only the shown part is visited.
    for piece in _pieces(value, most, _DEEPEST):
        text += piece
        if len(text) > most:
            return text[: most - 3] + "..."
    return text


def plain(name: Any) -> str:
    """Returns an identifier-like name without quotes, and any other value as `shown` does."""
    is_name = isinstance(name, str) and _PLAIN_NAME.fullmatch(name)
    return str(name) if is_name else shown(name, 60)


def _pieces(value: Any, most: int, deepest: int) -> Iterator[str]:
    """Yields parts of a value's `repr`; stops descending at `deepest` levels of nesting."""
    kind = type(value)
    if kind in (str, bytes, bytearray):
        yield repr(value[: most + 1])
    elif kind is int and value.bit_length() > 4 * most:
        # Python refuses to convert integers of thousands of digits to text.
        yield f"{'-' * (value < 0)}1e{int(value.bit_length() * 0.30103)}"
    elif kind in _BRACKETS and value:
        opening, closing = _BRACKETS[kind]
        yield opening
        if deepest == 0:
            yield "..."
        else:
            for index, item in enumerate(value):
                yield ", " if index else ""
                yield from _pieces(item, most, deepest - 1)
                if kind is dict:
                    yield ": "
                    yield from _pieces(value[item], most, deepest - 1)
        yield ",)" if kind is tuple and len(value) == 1 else closing
    else:
        try:
            yield repr(value)
        except Exception:  # a foreign `__repr__` may raise anything
            yield f"<{kind.__name__}>"


def nearest(name: Any, known: Iterable[str]) -> str | None:
    """Returns the known name closest to `name`; None if none is similar.

    At most 2,000 known names of at most 100 characters each are compared, to bound the time.
    """
    if not isinstance(name, str) or len(name) > _LONGEST_NAME:
        return None
    names = [n for n in itertools.islice(known, _MOST_NAMES) if len(n) <= _LONGEST_NAME]
    near = difflib.get_close_matches(name, names, n=1)
    near = near or difflib.get_close_matches(name.lower(), names, n=1)
    return near[0] if near else None


def did_you_mean(name: Any, known: Iterable[str], faults: Sequence[str] = ()) -> str:
    """Returns a "did you mean ...?" hint with the nearest known name; empty if none is similar.

    Once `faults` has reached `MOST_FAULTS`, further faults are not listed, so the search is
    skipped.
    """
    near = nearest(name, known) if len(faults) < MOST_FAULTS else None
    return "" if near is None else f"did you mean {near!r}?"


def counted(number: int, one: str, many: str = "") -> str:
    """Returns a number and its noun: `"1 microbatch"`, `"2 microbatches"`."""
    if number == 1:
        return f"1 {one}"
    plural = many or one + ("es" if one.endswith(("s", "x", "ch", "sh")) else "s")
    return f"{number} {plural}"


def sentence(faults: Iterable[str]) -> str:
    """Returns faults as one sentence, with a full stop unless it ends with a mark of its own."""
    text = "; ".join(faults)
    return text if text.endswith((".", "?", "!")) else f"{text}."


def numbered(faults: Sequence[str]) -> list[str]:
    """Returns the first `MOST_FAULTS` faults as numbered lines, then the number of omitted ones."""
    lines = [f"  {number}. {fault}" for number, fault in enumerate(faults[:MOST_FAULTS], start=1)]
    more = len(faults) - MOST_FAULTS
    return [*lines, f"  and {more} more."] if more > 0 else lines
