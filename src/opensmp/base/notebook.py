"""What a notebook shows of values: HTML without scripts, colours or outside resources."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

_PRE = "line-height: 1.25; white-space: pre; overflow-x: auto"
_CELL = "text-align: {align}; vertical-align: top; white-space: pre-line"


def preformatted(text: str) -> str:
    """Text with its columns and line breaks, of equally wide characters."""
    return f'<pre style="{_PRE}">{html.escape(text)}</pre>'


def paragraph(text: str) -> str:
    """Text as a paragraph."""
    return f"<p>{html.escape(text)}</p>"


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[str] = ()) -> str:
    """A table of text; columns are aligned to the right but for those with a title in `left`."""
    styles = [_CELL.format(align="left" if title in left else "right") for title in titles]

    def row(cells: Sequence[str], tag: str) -> str:
        made = (
            f'<{tag} style="{style}">{html.escape(cell)}</{tag}>'
            for cell, style in zip(cells, styles, strict=True)
        )
        return f"<tr>{''.join(made)}</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return f"<table><thead>{row(titles, 'th')}</thead><tbody>{body}</tbody></table>"
