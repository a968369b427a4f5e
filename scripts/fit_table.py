#!/usr/bin/env python
"""Compares every argument of `fit` and its like, and every callback, with plain Keras.

    python scripts/fit_table.py            # all of them; writes the tables of docs/fit-table.md
    python scripts/fit_table.py saved      # prints what one use of tests/training/uses.py gives

One process with two partitions, then two processes with one partition each, two replicas of the
model, and two replicas of two processes. In double precision, so that what is left is a matter of
the order in which numbers are added.
"""

from __future__ import annotations

import argparse
import datetime
import pickle
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import keras  # noqa: E402
import made_part  # noqa: E402
import tensorflow as tf  # noqa: E402
from processes import check_ranks  # noqa: E402
from training import uses  # noqa: E402
from training.uses import ALONE, LEFT_OUT, NOT_SHARED, USES  # noqa: E402

import opensmp as smp  # noqa: E402

PAGE = ROOT / "docs" / "fit-table.md"
RANKS = str(ROOT / "tests" / "training" / "shared.py")
MICROBATCHES = 3
WORLDS = {"1 process": (1, 2), "2 processes": (2, 2), "2 replicas": (2, 1), "2 x 2": (4, 2)}
TITLES = {
    "compile": "Arguments of `compile`",
    "fit": "Arguments of `fit`",
    "evaluate": "Arguments of `evaluate`",
    "predict": "Arguments of `predict`",
    "callbacks": "Callbacks",
}

Differences = dict[str, dict[str, float]]


def main() -> int:
    """Compares and writes the tables; returns 1 if a difference is out of its bound."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("uses", nargs="*", metavar="USE", help="only these, without the tables")
    names = parser.parse_args().uses
    found: Differences = {}
    with tempfile.TemporaryDirectory() as folder:
        for world in WORLDS:
            found[world] = compare(world, names or list(USES), Path(folder))
            if WORLDS[world][0] == 1 and not names:
                found[world] |= compare(world, list(ALONE), Path(folder))
            for name, difference in found[world].items():
                print(f"{world:12} {name:14} {difference:.1e}", flush=True)
    if not names:
        made_part.write(PAGE, "fit_table", tables(found))
    known = {**USES, **ALONE}
    bad = [(w, n) for w, each in found.items() for n, d in each.items() if d > known[n].bound]
    print(*(f"out of its bound: {name} in {world}" for world, name in bad), sep="\n")
    return 1 if bad else 0


def compare(world: str, names: Sequence[str], folder: Path) -> dict[str, float]:
    """The largest difference from plain Keras for each use."""
    num_processes, partitions = WORLDS[world]
    config = {"partitions": partitions, "microbatches": MICROBATCHES}
    if num_processes == 1:
        if not smp.is_initialized():
            smp.init({**config, "devices": "cpu"})
        return {
            name: uses.difference(plain(name, folder), uses.record(name, folder / "split" / name))
            for name in names
        }
    place = folder / world
    check_ranks(RANKS, num_processes, config, args=[place, *names], seconds=1800)
    return {
        name: max(
            uses.difference(
                plain(name, folder),
                pickle.loads((place / f"{name}-{rank}.pickle").read_bytes()),
                rank,
            )
            for rank in range(num_processes)
        )
        for name in names
    }


_plain: dict[str, uses.Record] = {}


def plain(name: str, folder: Path) -> uses.Record:
    """What plain Keras gives."""
    if name not in _plain:
        _plain[name] = uses.record(name, folder / "plain" / name, plain=True)
    return _plain[name]


def tables(found: Mapping[str, Mapping[str, float]]) -> str:
    """The results as Markdown."""
    lines = [
        f"Run {datetime.date.today().isoformat()} on CPU, Keras {keras.__version__}, TensorFlow "
        f"{tf.__version__}."
    ]
    for kind, title in TITLES.items():
        rows = [row for row in uses.all_rows() if row.startswith(f"{kind}.")]
        lines += ["", f"## {title}", "", "| | one process | several processes |", "|---|---|---|"]
        lines += [f"| `{row.split('.')[1]}` | {' | '.join(cells(row, found))} |" for row in rows]
    return "\n".join(lines)


def cells(row: str, found: Mapping[str, Mapping[str, float]]) -> tuple[str, str]:
    """What one process and several give for an argument or a callback."""
    covering = [name for name, use in {**USES, **ALONE}.items() if row in use.rows]
    alone = [found[w][n] for w in WORLDS for n in covering if WORLDS[w][0] == 1]
    shared = [found[w][n] for w in WORLDS for n in covering if WORLDS[w][0] > 1 and n in found[w]]
    first = LEFT_OUT.get(row) or equal(max(alone))
    return first, NOT_SHARED.get(row) or equal(max(shared))


def equal(difference: float) -> str:
    """A difference in words."""
    return f"equal to plain Keras ({difference:.0e})" if difference else "equal to plain Keras"


if __name__ == "__main__":
    sys.exit(main())
