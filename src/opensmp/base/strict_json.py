"""A strict JSON parser for untrusted input that raises a single family of errors.

Python's `json` raises four kinds of errors for invalid or oversized input. It also accepts input
that is not JSON (NaN and infinity), turns large numbers into infinity, and silently drops the first
of two equal keys.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn


class JsonFault(ValueError):
    """A text is not JSON, or is JSON that is rejected; the message states the reason."""


class NotJson(JsonFault):
    """A text is not valid JSON."""


def parse_json(text: str | bytes, *, nonfinite: bool = False) -> Any:
    """Parses a JSON text strictly.

    Args:
        text: The text; bytes are decoded as UTF-8.
        nonfinite: Whether to accept `NaN`, `Infinity` and `-Infinity`, which Keras writes.
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
    except ValueError:  # Python parses integers of a few thousand digits at most
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
