#!/usr/bin/env python
"""Runs the matrix of tests/saving/test_matrix.py and writes its table into docs/saving.md.

    python scripts/saving_table.py            # what is not done yet, then the table
    python scripts/saving_table.py --fresh    # all of it, about fifteen minutes
    python scripts/saving_table.py --results  # the table alone, of results that are there

Results are kept in docs/saving.jsonl, one line for each file that was loaded under each set-up, so
that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import made_part  # noqa: E402
from saving.matrix import FORMATS, SETUPS, STATEFUL, split  # noqa: E402

NAMES = {
    "none": "no strategy",
    "mirrored-2": "`MirroredStrategy`, 2 replicas",
    "mirrored-4": "`MirroredStrategy`, 4 replicas",
    "multi-worker": "`MultiWorkerMirroredStrategy`, 1 worker",
    "opensmp-2": "opensmp, 2 partitions",
    "opensmp-4": "opensmp, 4 partitions",
    "hybrid": "opensmp, 2 partitions x 2 replicas in 2 processes",
}


def main() -> int:
    """Runs and writes; returns 1 if a cell is not as it should be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", action="store_true", help="run nothing")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--record", type=Path, default=ROOT / "docs" / "saving.jsonl")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "saving.md")
    arguments = parser.parse_args()
    if arguments.fresh:
        arguments.record.unlink(missing_ok=True)
    if not arguments.results:
        run(arguments.record)
    results = load(arguments.record)
    made_part.write(arguments.page, "saving_table", table(results))
    good = sum(not result["faults"] for result in results)
    whole = len(SETUPS) ** 2 * len(FORMATS)
    print(f"{good} of {whole} loads are as they should be; table in {arguments.page}")
    return int(good < whole)


def run(record: Path) -> None:
    """Runs the set-ups whose files have not been loaded everywhere, one after the other."""
    environ = {**os.environ, "SAVING_TABLE_RECORD": str(record)}
    for setup in SETUPS:
        done = [r for r in load(record) if split(r["name"])[0] == setup and not r["faults"]]
        if len(done) < len(SETUPS) * len(FORMATS):
            chosen = ["tests/saving/test_matrix.py", "-m", "slow", "-k", f"{setup}-"]
            subprocess.run(
                [sys.executable, "-m", "pytest", "-q", *chosen], cwd=ROOT, env=environ, check=False
            )


def load(record: Path) -> list[dict[str, Any]]:
    """The newest result of each file under each set-up."""
    lines = record.read_text().splitlines() if record.exists() else []
    results = [json.loads(line) for line in lines]
    return list({(result["name"], result["setup"]): result for result in results}.values())


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    if not results:
        return "There are no results yet."
    found: dict[tuple[str, str], dict[str, bool]] = defaultdict(dict)
    for result in results:
        found[split(result["name"])][result["setup"]] = not result["faults"]
    differences = [r["difference"] for r in results if r["difference"] is not None]
    lines = [
        f"Run {datetime.date.today().isoformat()} on CPU. The largest difference of a loss after "
        f"going on with training was {max(differences, default=0):.1e}.",
        "",
        f"| saved under | {' | '.join(FORMATS.values())} |",
        f"|---|{'---|' * len(FORMATS)}",
    ]
    for setup in SETUPS:
        cells = [cell(found[setup, ending], ending) for ending in FORMATS]
        lines.append(f"| {NAMES[setup]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(loaded: dict[str, bool], ending: str) -> str:
    """How many set-ups loaded a file."""
    good = sum(loaded.values())
    text = f"{good} of {len(SETUPS)}"
    if good < len(SETUPS):
        return f"**{text}**"
    return text if ending in STATEFUL else f"{text}, weights"


if __name__ == "__main__":
    sys.exit(main())
