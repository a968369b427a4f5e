"""The layout of the package: which room may import which, and how large folders and files are."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

SOURCE = Path(__file__).parents[1] / "src"
PACKAGE = "opensmp"
MOST_ENTRIES = 12
MOST_LINES = 450

# A room may import itself and what has a lower rank.
RANKS = {
    "errors": 0,
    "base": 1,
    "_private": 2,
    "config": 3,
    "compiler": 4,
    "distributed": 5,
    "execution": 6,
    "cli": 7,
    "saving": 8,
    "training": 9,
    "api": 10,
    "compat": 11,
    "": 12,  # opensmp itself, and `python -m opensmp`
}

# Python asks for these three at the root, beside the rooms.
PRESCRIBED = {"__init__.py", "__main__.py", "py.typed"}


class Import(NamedTuple):
    """One import of a module of the package by another."""

    importer: str
    imported: str
    at_import: bool
    """Whether it happens when the importer is imported, not in a function."""


def module_of(path: Path) -> str:
    """Name of a file's module, without the package's own name: `config.kinds`."""
    parts = path.relative_to(SOURCE / PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in sorted((SOURCE / PACKAGE).rglob("*.py"))}


def room_of(module: str) -> str:
    return "" if module == "__main__" else module.partition(".")[0]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports_below(node: ast.AST, at_import: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    """Import statements that are run, and whether at the import of the module."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node, at_import
    inside = at_import and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    children = node.orelse if is_type_checking(node) else ast.iter_child_nodes(node)  # type: ignore[attr-defined]
    for child in children:
        yield from imports_below(child, inside)


def imported_modules(node: ast.AST) -> Iterator[str]:
    """Modules of the package that a statement names, as `FILES` has them."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    else:
        assert isinstance(node, ast.ImportFrom)
        assert node.level == 0, "write the whole name of what is imported"
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    for name in names:
        root, _, module = name.partition(".")
        if root == PACKAGE:
            yield module if module in FILES else module.rpartition(".")[0]


def all_imports() -> list[Import]:
    return sorted(
        {
            Import(module, imported, at_import)
            for module, path in FILES.items()
            for node, at_import in imports_below(ast.parse(path.read_text(encoding="utf-8")))
            for imported in imported_modules(node)
        }
    )


def circles(imports: list[Import]) -> list[set[str]]:
    """Groups of modules that import each other at their import; each is as large as can be."""
    direct: dict[str, set[str]] = {module: set() for module in FILES}
    for each in imports:
        if each.at_import:
            direct[each.importer].add(each.imported)
    reached = {module: set(after) for module, after in direct.items()}
    for middle in reached:
        for after in reached.values():
            if middle in after:
                after |= reached[middle]
    found: list[set[str]] = []
    for module, after in reached.items():
        if module in after and not any(module in circle for circle in found):
            found.append({other for other in after if module in reached[other]})
    return found


def test_every_room_has_its_place_in_the_order():
    assert {room_of(module) for module in FILES} == RANKS.keys()


def test_rooms_import_only_what_is_below_them():
    upward = {
        (each.importer, each.imported)
        for each in all_imports()
        if room_of(each.importer) != room_of(each.imported)
        and RANKS[room_of(each.importer)] <= RANKS[room_of(each.imported)]
    }
    faults = [
        f"{FILES[importer].relative_to(SOURCE)} imports {PACKAGE}.{imported}, but "
        f"{room_of(importer)}/ (rank {RANKS[room_of(importer)]}) may only import itself and rooms "
        f"below it, and {room_of(imported)}/ has rank {RANKS[room_of(imported)]}"
        for importer, imported in sorted(upward)
    ]
    assert not faults, "\n".join(faults)


def test_no_modules_import_each_other_in_a_circle():
    imports = all_imports()
    faults = []
    for circle in circles(imports):
        faults.append(f"{len(circle)} modules import each other in a circle:")
        faults += [
            f"  {FILES[each.importer].relative_to(SOURCE)} imports {PACKAGE}.{each.imported}"
            for each in imports
            if each.at_import and {each.importer, each.imported} <= circle
        ]
    assert not faults, "\n".join(faults)


def folders() -> list[Path]:
    return sorted({path.parent for path in FILES.values()})


@pytest.mark.parametrize(
    "folder", folders(), ids=lambda folder: folder.relative_to(SOURCE).as_posix()
)
def test_folder_has_few_entries(folder):
    entries = {path.name for path in folder.iterdir()} - {"__pycache__"}
    if folder == SOURCE / PACKAGE:
        entries -= PRESCRIBED
    assert len(entries) <= MOST_ENTRIES, (
        f"{folder.relative_to(SOURCE)} has {len(entries)} entries, and may have {MOST_ENTRIES}: "
        f"{sorted(entries)}"
    )


def test_files_are_short():
    lengths = {
        module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in FILES.items()
    }
    faults = [
        f"{FILES[module].relative_to(SOURCE)} has {length} lines, and may have {MOST_LINES}"
        for module, length in sorted(lengths.items())
        if length > MOST_LINES
    ]
    assert not faults, "\n".join(faults)
