"""JSON that somebody else wrote, read with one kind of error.

Python's reader raises four kinds of errors for what is no JSON, or more than it can hold; and it
takes what JSON is not: NaN and infinity, numbers that become infinity, and a key that comes twice,
of which it drops the first without a word.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn


class JsonFault(ValueError):
    """A text is not JSON, or not JSON that can be used; the message says why and where."""


class NotJson(JsonFault):
    """A text is not JSON at all."""


def parse_json(text: str | bytes, *, nonfinite: bool = False) -> Any:
    """Reads a JSON text.

    Args:
        text: The text; bytes are UTF-8.
        nonfinite: Whether `NaN`, `Infinity` and `-Infinity` are taken, as Keras writes them.

    Returns:
        The value.

    Raises:
        NotJson: The text is not JSON.
        JsonFault: It is, but it is nested too deeply, holds a number of thousands of digits or
            one that no float can hold, or names a key twice in one object.

    Example:
        >>> parse_json('{"partitions": 2, "partitions": 4}')
        Traceback (most recent call last):
        opensmp.base.strict_json.JsonFault: the key 'partitions' comes twice in one object
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        return json.loads(
            text,
            object_pairs_hook=_once,
            parse_float=float if nonfinite else _finite,
            parse_constant=_CONSTANTS.__getitem__ if nonfinite else _refuse_constant,
        )
    except JsonFault:
        raise
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise NotJson(f"{error.msg} in {where}") from None
    except UnicodeDecodeError:
        raise NotJson("it is not UTF-8") from None
    except RecursionError:
        raise JsonFault("it is nested too deeply") from None
    except ValueError:  # Python reads no integers of more than some thousand digits
        raise JsonFault("a number has too many digits") from None


_CONSTANTS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise JsonFault(f"the key {key[:60]!r} comes twice in one object")
            seen.add(key)
    return found


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise JsonFault(f"the number {text[:60]} is too large")
    return number


def _refuse_constant(text: str) -> NoReturn:
    raise NotJson(f"{text} is no JSON number")
