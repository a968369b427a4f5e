"""Values that somebody else gave, as they stand in messages: short, whatever they are."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

MOST_FAULTS = 50
"""Faults that one message lists; that there are more is said."""

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
    """A value as Python writes it, cut where it gets long; never fails, and never takes long.

    Args:
        value: Anything.
        most: Number of characters.

    Example:
        >>> shown([1, 2, "a"]), shown("a" * 1000, 10)
        ("[1, 2, 'a']", "'aaaaaa...")
    """
    text = ""
    # A list may have millions of items, or be inside itself: no more is looked at than is shown.
    for piece in _pieces(value, most, _DEEPEST):
        text += piece
        if len(text) > most:
            return text[: most - 3] + "..."
    return text


def plain(name: Any) -> str:
    """A name without quotes if it is one, for messages; a key of a dict may be anything."""
    is_name = isinstance(name, str) and _PLAIN_NAME.fullmatch(name)
    return str(name) if is_name else shown(name, 60)


def _pieces(value: Any, most: int, deepest: int) -> Iterator[str]:
    kind = type(value)
    if kind in (str, bytes, bytearray):
        yield repr(value[: most + 1])
    elif kind is int and value.bit_length() > 4 * most:
        # Python writes no integers of thousands of digits.
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
        except Exception:  # a type of somebody else may do anything
            yield f"<{kind.__name__}>"


def nearest(name: Any, known: Iterable[str]) -> str | None:
    """The known name that was meant, perhaps; None if none is near.

    Args:
        name: What was given.
        known: The names that there are; only some thousand are looked at.

    Example:
        >>> nearest("microbatch", ["partitions", "microbatches"])
        'microbatches'
    """
    if not isinstance(name, str) or len(name) > _LONGEST_NAME:
        return None
    names = [n for n in itertools.islice(known, _MOST_NAMES) if len(n) <= _LONGEST_NAME]
    near = difflib.get_close_matches(name, names, n=1)
    near = near or difflib.get_close_matches(name.lower(), names, n=1)
    return near[0] if near else None


def did_you_mean(name: Any, known: Iterable[str], faults: Sequence[str] = ()) -> str:
    """A question for the nearest known name; empty if none is near.

    Args:
        name: What was given.
        known: The names that there are.
        faults: Those found so far: for one that is not listed, nothing is looked for.
    """
    near = nearest(name, known) if len(faults) < MOST_FAULTS else None
    return "" if near is None else f"did you mean {near!r}?"


def numbered(faults: Sequence[str]) -> list[str]:
    """Faults as numbered lines; of very many the first ones, and how many more there are."""
    lines = [f"  {number}. {fault}" for number, fault in enumerate(faults[:MOST_FAULTS], start=1)]
    more = len(faults) - MOST_FAULTS
    return [*lines, f"  and {more} more."] if more > 0 else lines
