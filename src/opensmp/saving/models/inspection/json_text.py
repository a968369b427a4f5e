"""Parses JSON from untrusted files."""

from __future__ import annotations

from typing import Any

from opensmp.base.strict_json import JsonFault, NotJson, parse_json
from opensmp.errors import SavingError


def object_of(text: str | bytes, where: str, what: str) -> dict[str, Any]:
    """Parses a JSON object.

    Args:
        text: The text, or its UTF-8 encoding.
        where: The location for messages, such as `"config.json in x.keras"`.
        what: Name of the operation for messages.

    Raises:
        SavingError: It is not JSON, is nested too deeply, or is not an object.

    Example:
        ```python
        object_of(b'{"class_name": "Sequential"}', "config.json in x.keras", "smp.load_model")
        ```
    """
    try:
        found = parse_json(text, nonfinite=True)  # Keras writes NaN and infinity
    except NotJson as error:
        raise SavingError(_damaged(where, what, f"not JSON ({error})")) from error
    except JsonFault as error:
        raise SavingError(_damaged(where, what, f"JSON that cannot be read ({error})")) from error
    if not isinstance(found, dict):
        kind = "null" if found is None else type(found).__name__
        raise SavingError(_damaged(where, what, f"{kind}, where an object, {{...}}, is expected"))
    return found


def configuration_of(text: str | bytes, where: str, what: str) -> dict[str, Any]:
    """Parses the configuration of a model; see `object_of`.

    Raises:
        SavingError: Also if `class_name` or `config` is missing.
    """
    found = object_of(text, where, what)
    if not isinstance(found.get("class_name"), str) or not isinstance(found.get("config"), dict):
        shown = ", ".join(map(repr, sorted(found)[:5])) or "nothing"
        raise SavingError(
            _damaged(where, what, f"no configuration of a model, but an object with {shown}")
            + " Expected: 'class_name', a string, and 'config', an object."
        )
    return found


def _damaged(where: str, what: str, why: str) -> str:
    return f"{what}: {where} is {why}. The file is damaged, or half a file: write it again."
