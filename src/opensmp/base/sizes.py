"""Parses amounts of bytes that people write."""

from __future__ import annotations

import re

from opensmp.base.message_text import shown
from opensmp.errors import ConfigError

_BYTES = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)")
_MOST_BYTES = 2**60
_SPELLED = {"KIB": "KiB", "MIB": "MiB", "GIB": "GiB", "TIB": "TiB", "KB": "kB"}


def parse_bytes(text: str, what: str = "size") -> int:
    """Parses an amount of memory such as `"16GiB"` to bytes.

    Args:
        text: A number and a unit: B; kB, MB, GB, TB (powers of 1000); KiB, MiB, GiB, TiB (powers of
            1024). Case is ignored. A number without a unit is in bytes.
        what: Name of the quantity in the error message.
    """
    match = _SIZE.fullmatch(text.strip())
    hint = "write a number and a unit, such as 16GiB, 16GB or 512MiB"
    if match:
        number, unit = match.group(1), match.group(2).upper() or "B"
        if unit in _BYTES:
            size = float(number) * _BYTES[unit]
            if 0.5 < size <= _MOST_BYTES:
                return round(size)
            hint = "it must be at least one byte" if size < 1 else "no device has as much"
        elif f"{unit}B" in _BYTES and f"{unit}IB" in _BYTES:
            binary, decimal = _unit(f"{unit}IB"), _unit(f"{unit}B")
            hint = (
                f"'{match.group(2)}' may mean two things: write {number[:30]}{binary} "
                f"({1024:d}s) or {number[:30]}{decimal} (1000s)"
            )
        else:
            known = ", ".join(map(_unit, _BYTES))
            hint = f"the unit {shown(match.group(2), 30)} is not known; use one of {known}"
    raise ConfigError(f"{what}: received {shown(text)}, which is no amount of memory; {hint}.")


def _unit(name: str) -> str:
    return _SPELLED.get(name, name)
