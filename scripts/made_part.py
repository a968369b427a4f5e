"""The part of a page that a script has made, between two marks."""

from __future__ import annotations

from pathlib import Path

END = "<!-- end -->"


def begin(script: str) -> str:
    """The line before the part that a script makes."""
    return f"<!-- begin: made by scripts/{script}.py -->"


def write(page: Path, script: str, text: str) -> None:
    """Puts a text in the place of what is between the marks of a script.

    Args:
        page: The Markdown page.
        script: Name of the script, without its ending.
        text: What is to stand there, without a newline at its end.

    Raises:
        SystemExit: The page lacks a mark; nothing is written.
    """
    first = begin(script)
    before, found, rest = page.read_text(encoding="utf-8").partition(first)
    _, end, after = rest.partition(END)
    if not (found and end):
        raise SystemExit(f"{script}: {page} must contain the lines {first!r} and {END!r}.")
    page.write_text(f"{before}{first}\n{text}\n{END}{after}", encoding="utf-8")
