"""Writes docs/api.md, from which mkdocstrings makes the reference of all public names.

    python scripts/api_reference.py

`tests/test_api_reference.py` checks that the page is what this makes.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import opensmp

PAGE = Path(__file__).resolve().parents[1] / "docs" / "api.md"

INTRODUCTION = """\
# API reference

<!-- made by scripts/api_reference.py -->

All names of `import opensmp as smp`. `import smp` and
`import smdistributed.modelparallel.tensorflow as smp` have the same ones. The page on [the smp
API](smp-api.md) goes through the names of the vendor's library; those on
[configuration](configuration.md) and [`smp.step`](step.md) explain how things work together.
"""

GROUPS = {
    "Functions": lambda value: inspect.isfunction(value),
    "Classes": lambda value: inspect.isclass(value) and not issubclass(value, BaseException),
    "Errors": lambda value: inspect.isclass(value) and issubclass(value, BaseException),
}


def place_of(name: str) -> str:
    """The module that defines a public name, and the name."""
    value = getattr(opensmp, name)
    module = getattr(value, "__module__", None)
    if not isinstance(value, type) and not inspect.isfunction(value):
        module = type(value).__module__  # a member of an enumeration, a constant beside its class
    return f"{module}.{name}"


def text() -> str:
    return "\n".join(_parts())


def _parts() -> Iterator[str]:
    yield INTRODUCTION
    names = list(opensmp.__all__)
    for title, belongs in GROUPS.items():
        yield f"## {title}\n"
        for name in [name for name in names if belongs(getattr(opensmp, name))]:
            names.remove(name)
            yield _directive(name)
    yield "## Groups of ranks\n"
    yield "Short names of the members of `smp.CommGroup`:\n"
    yield "\n".join(f"- `smp.{name}`: `{getattr(opensmp, name)}`" for name in names) + "\n"


def _directive(name: str) -> str:
    options = [f"heading: smp.{name}", f"toc_label: {name}", "heading_level: 3"]
    lines = "\n".join(f"      {option}" for option in options)
    return f"::: {place_of(name)}\n    options:\n{lines}\n"


def main() -> None:
    PAGE.write_text(text(), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
