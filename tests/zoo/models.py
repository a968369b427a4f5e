"""The zoo: every model whose automatic plans are compared with plain Keras."""

from __future__ import annotations

from collections.abc import Mapping

from zoo.applications import APPLICATIONS, order
from zoo.backbones import BACKBONES
from zoo.entry import SIZES, Entry

ZOO: Mapping[str, Entry] = {**APPLICATIONS, **BACKBONES}


def by_size(*sizes: str) -> list[Entry]:
    """The entries of the given sizes (all, if none is given), the quickest first."""
    entries = [e for e in ZOO.values() if not sizes or e.size in sizes]
    return sorted(entries, key=lambda e: (SIZES.index(e.size), order(e.name)))
