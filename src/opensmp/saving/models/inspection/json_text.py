"""Parses JSON from untrusted files."""

from __future__ import annotations

from typing import Any

from opensmp.base.strict_json import JsonFault, NotJson, parse_json
from opensmp.errors import SavingError


def object_of(text: str | bytes, where: str, what: str) -> dict[str, Any]:
    """Parses a JSON object; `where` locates it in messages, such as `"config.json in x.keras"`."""
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
    """Parses the configuration of a model, with `class_name` and `config`; see `object_of`."""
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
