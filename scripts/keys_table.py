"""Writes the keys of the configuration into docs/configuration.md.

python scripts/keys_table.py
"""

from __future__ import annotations

import pathlib
import re
from dataclasses import fields

import made_part

from opensmp.config import Config
from opensmp.config.keys import KEYS

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

_CODE = re.compile(r"\[[^\]]+\]|'\w+'|\b(?:True|False|None|nan|smp\.\w+)\b")


def main() -> None:
    made_part.write(PAGE, "keys_table", table())


def table() -> str:
    """The keys as a Markdown table, one row a key."""
    lines = ["| key | accepted | default | meaning |", "| --- | --- | --- | --- |"]
    for field in fields(Config):
        key = KEYS[field.name]
        default = key.default or f"`{field.default!r}`".replace("'", '"')
        lines.append(f"| `{field.name}` | {_marked(key.kind.accepted)} | {default} | {key.help} |")
    return "\n".join(lines)


def _marked(text: str) -> str:
    """A text with the values in it marked as code."""
    return _CODE.sub(lambda found: f"`{found[0]}`".replace("'", '"'), text)


if __name__ == "__main__":
    main()
