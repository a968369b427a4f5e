#!/usr/bin/env python
"""Compares whole training programs with plain Keras, and writes the table of docs/programs.md.

    python scripts/programs_table.py                  # all programs in all worlds: about an hour
    python scripts/programs_table.py wgan_gp maml     # these anew; the others as they were
    python scripts/programs_table.py --world "2 ranks"
    python scripts/programs_table.py --table          # writes the table from docs/programs.jsonl

What was found is kept in docs/programs.jsonl, a line for each program and world. Returns 1 if
anything is not what `tests/programs` says of it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import keras  # noqa: E402
import made_part  # noqa: E402
import tensorflow as tf  # noqa: E402
from programs.catalogue import PROGRAMS  # noqa: E402
from programs.registry import ALONE, WORLDS, Program  # noqa: E402
from programs.running import APART, is_there, judge, run_in_processes  # noqa: E402

PAGE = ROOT / "docs" / "programs.md"
FOUND = ROOT / "docs" / "programs.jsonl"
COLUMNS = {"one process": ALONE, "2 ranks": ("2 ranks",), "2 x 2": ("2 x 2",)}

Found = dict[tuple[str, str], dict[str, Any]]


def main() -> int:
    """Compares, keeps what was found, and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help="only these")
    parser.add_argument("--world", action="append", choices=list(WORLDS), help="only this world")
    parser.add_argument("--table", action="store_true", help="only write the table")
    arguments = parser.parse_args()
    found = read()
    wrong = []
    for world in [] if arguments.table else arguments.world or list(WORLDS):
        names = [n for n in arguments.programs or list(PROGRAMS) if is_there(PROGRAMS[n])]
        for line in compare(world, names):
            found[line["program"], world] = line
            print(f"{world:18} {line['program']:36} {line['words'][:200]}", flush=True)
            if not line["right"]:
                wrong.append(f"{line['program']}, {world}: {line['words']}")
        write(found)
    made_part.write(PAGE, "programs_table", tables(found))
    print(*(f"not as it should be: {each}" for each in wrong), sep="\n")
    return 1 if wrong else 0


def compare(world: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """What each program gives in a world, compared with plain Keras."""
    lines = []
    for name, outcomes in run_in_processes(world, names, seconds=7200).items():
        verdict = judge(name, world, outcomes)
        lines.append(
            {
                "program": name,
                "world": world,
                "right": verdict.right,
                "difference": None if verdict.difference != verdict.difference
                else float(f"{verdict.difference:.1e}"),
                "words": verdict.words if verdict.right else verdict.words[:300],
                "date": datetime.date.today().isoformat(),
            }
        )  # fmt: skip
    return lines


def read() -> Found:
    """What was found before."""
    if not FOUND.exists():
        return {}
    lines = [json.loads(line) for line in FOUND.read_text(encoding="utf-8").splitlines()]
    return {(line["program"], line["world"]): line for line in lines if line["program"] in PROGRAMS}


def write(found: Found) -> None:
    """Keeps what was found, in the order of the programs."""
    order = [(name, world) for name in PROGRAMS for world in WORLDS if (name, world) in found]
    text = "".join(json.dumps(found[key]) + "\n" for key in order)
    FOUND.write_text(text, encoding="utf-8")


def tables(found: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    """The results as Markdown: a table for each way to train, in the order of the programs."""
    dates = sorted({line["date"] for line in found.values()})
    when = " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else "never"
    lines = [
        f"Run {when} on CPU, Keras {keras.__version__}, TensorFlow {tf.__version__}.",
        "",
        f"| program | name | {' | '.join(COLUMNS)} |",
        "|---|---|---|---|---|",
    ]
    for name, program in PROGRAMS.items():
        cells = [cell(program, [found.get((name, w)) for w in ws]) for ws in COLUMNS.values()]
        lines.append(f"| {program.title} | `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(program: Program, lines: Sequence[Mapping[str, Any] | None]) -> str:
    """What some worlds have in common, in words."""
    known = [line for line in lines if line is not None]
    if not known:
        return "not run"
    wrong = [line for line in known if not line["right"]]
    if wrong:
        return f"**not yet**: {wrong[0]['words'].splitlines()[0][:100].replace('|', '/')}"
    refusals = [line["words"] for line in known if line["words"].startswith("refused")]
    if refusals:
        return str(refusals[0])
    apart = [line["words"] for line in known if line["words"].startswith(APART)]
    if apart:
        return str(apart[0])
    note = f"; {program.why}" if program.why else ""
    worst = max(line["difference"] for line in known)
    return f"equal ({worst:.0e}){note}" if worst else f"equal{note}"


if __name__ == "__main__":
    sys.exit(main())
