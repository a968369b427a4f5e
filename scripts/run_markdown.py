"""Runs the Python code of Markdown pages, each page as one program in a fresh process.

    python scripts/run_markdown.py docs/tutorial.md docs/step.md

Blocks fenced with ```python are run, in the order of the page; a fragment that cannot run
on its own is fenced with ```py, which looks the same on the site. A page with the comment
<!-- opensmp run -n 4 --> is run by that command. Line numbers in a traceback are those of the
page. The exit status is that of the first page that fails.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FENCE = "```"
LAUNCHED = re.compile(r"^<!-- opensmp (run .*) -->$", re.MULTILINE)


def program_of(markdown: str, page: str = "page") -> str:
    """The page's Python blocks, every other line blanked, so that line numbers stay.

    Raises:
        ValueError: A fence is not closed, so nobody can tell code from text.
    """
    lines: list[str] = []
    opened: int | None = None
    runs = False
    indent = ""
    for number, line in enumerate(markdown.splitlines(), start=1):
        stripped = line.strip()
        if opened is None and stripped.startswith(FENCE):
            opened = number
            runs = stripped.removeprefix(FENCE).split(" ")[0] == "python"
            indent = line[: len(line) - len(line.lstrip())]
            lines.append("")
        elif opened is not None and stripped == FENCE:
            opened = None
            lines.append("")
        else:
            lines.append(line.removeprefix(indent) if opened is not None and runs else "")
    if opened is not None:
        raise ValueError(f"{page}: the code block opened in line {opened} is never closed.")
    return "\n".join(lines) + "\n"


def run_page(page: Path, timeout_seconds: float) -> int:
    """Runs a page in a directory of its own; 0 if all went well."""
    text = page.read_text(encoding="utf-8")
    program = program_of(text, str(page))
    launched = LAUNCHED.search(text)
    launcher = ["-m", "opensmp", *shlex.split(launched[1])] if launched else []
    if not program.strip():
        print(f"{page}: no code to run", flush=True)
        return 0
    started = time.perf_counter()
    # A real file, because tf.function reads the source of what it is given.
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, f"{page.stem}_page.py")
        script.write_text(program, encoding="utf-8")
        try:
            status = subprocess.run(
                [sys.executable, *launcher, str(script)],
                cwd=folder,
                env={"TF_CPP_MIN_LOG_LEVEL": "3", **os.environ},
                timeout=timeout_seconds,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            print(f"{page}: still running after {timeout_seconds:g} s", file=sys.stderr)
            return 124
    verdict = "passed" if status == 0 else f"failed (exit {status})"
    print(f"{page}: {verdict} in {time.perf_counter() - started:.1f} s", flush=True)
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pages", nargs="+", type=Path, metavar="PAGE")
    parser.add_argument("--timeout", type=float, default=240, help="seconds per page")
    arguments = parser.parse_args()
    for page in arguments.pages:
        if status := run_page(page, arguments.timeout):
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
