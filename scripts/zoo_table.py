#!/usr/bin/env python
"""Compares every model of tests/zoo with plain Keras and writes the table of docs/zoo.md.

    python scripts/zoo_table.py                    # all that is not done yet, then the table
    python scripts/zoo_table.py ResNet50 VGG16     # these, again
    python scripts/zoo_table.py --size small       # the quick ones that are not done yet

One model runs at a time, in a process of its own. Results are kept in docs/zoo.jsonl, each with its
date and versions, so that a run that was stopped goes on where it was, also elsewhere.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import made_part  # noqa: E402
from zoo.entry import MICROBATCHES, SIZES, Entry  # noqa: E402
from zoo.models import ZOO, by_size  # noqa: E402
from zoo.runner import BOUNDS, Outcome, check, passed  # noqa: E402

PARTITIONS = (2, 4)
DISTRIBUTIONS = ("tensorflow-cpu", "tensorflow", "keras", "keras-hub", "numpy")


def main() -> int:
    """Sweeps and writes the table; returns 1 if a model is out of bounds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="models to run (again)")
    parser.add_argument("--size", choices=SIZES, action="append", help="only models of this size")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for each process")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "zoo.jsonl")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "zoo.md")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--table-only", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.models if name not in ZOO]
    if unknown:
        parser.error(f"not in the zoo: {', '.join(unknown)}; choose from {', '.join(ZOO)}")

    # As an exception, so that the comparison that is running ends as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if arguments.fresh:
        arguments.results.unlink(missing_ok=True)
    done = load(arguments.results)
    if not arguments.table_only:
        entries = [ZOO[name] for name in arguments.models] or by_size(*(arguments.size or ()))
        waiting = [e for e in entries if arguments.models or not is_done(done.get(e.name, []))]
        sweep(waiting, done, arguments.results, arguments.timeout)
    made_part.write(arguments.page, "zoo_table", table(done))
    bad = [name for name, outcomes in done.items() if not is_good(outcomes)]
    missing = [name for name in ZOO if name not in done]
    good = len(done) - len(bad)
    print(f"{good} of {len(ZOO)} models are within bounds; table in {arguments.page}")
    print(*(f"out of bounds: {name}" for name in bad), sep="\n", end="\n" if bad else "")
    print(*(f"not run yet: {name}" for name in missing), sep="\n", end="\n" if missing else "")
    return 1 if bad else 0


def sweep(
    entries: Sequence[Entry], done: dict[str, list[Outcome]], results: Path, timeout: float
) -> None:
    """Runs the comparisons of these models, prints and keeps each."""
    results.parent.mkdir(parents=True, exist_ok=True)
    for number, entry in enumerate(entries, start=1):
        start = time.monotonic()
        outcomes = []
        for outcome in check(entry.name, PARTITIONS, timeout):
            outcomes.append(outcome)
            print(f"[{number}/{len(entries)}] {outcome}", flush=True)
        stamp = {"date": datetime.date.today().isoformat(), "versions": versions()}
        for outcome in outcomes:
            outcome.details.update(stamp, seconds=round(time.monotonic() - start))
        done[entry.name] = outcomes
        with results.open("a") as file:
            file.writelines(f"{outcome.to_json()}\n" for outcome in outcomes)


def load(results: Path) -> dict[str, list[Outcome]]:
    """The newest results of each model."""
    done: dict[str, list[Outcome]] = {}
    for line in results.read_text().splitlines() if results.exists() else []:
        outcome = Outcome.from_json(line)
        outcomes = done.setdefault(outcome.model, [])
        if any((o.partitions, o.dtype) == (outcome.partitions, outcome.dtype) for o in outcomes):
            outcomes = done[outcome.model] = []  # the model ran again
        outcomes.append(outcome)
    return {name: done[name] for name in ZOO if name in done}


def is_done(outcomes: Iterable[Outcome]) -> bool:
    """Whether there is a comparison for every number of partitions."""
    return {o.partitions for o in outcomes if not o.failure} >= set(PARTITIONS)


def is_good(outcomes: Sequence[Outcome]) -> bool:
    """Whether a model is within its bound for every number of partitions."""
    return all(passed(outcomes, partitions) for partitions in PARTITIONS)


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"python": sys.version.split()[0]}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def table(done: dict[str, list[Outcome]]) -> str:
    """The results as Markdown."""
    if not done:
        return "There are no results yet."
    details = [o.details for outcomes in done.values() for o in outcomes if o.details]
    dates = sorted({d["date"] for d in details if "date" in d})
    stacks = sorted({json.dumps(d["versions"]) for d in details if "versions" in d})
    stack = "; or ".join(
        ", ".join(f"{name} {version}" for name, version in json.loads(text).items())
        for text in stacks
    )
    good = sum(is_good(outcomes) for outcomes in done.values())
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    lines = [
        f"Run {when} on CPU, {stack}; {MICROBATCHES} microbatches. {len(done)} of {len(ZOO)} "
        f"models were compared, {good} of them are within their bounds.",
    ]
    for family in dict.fromkeys(entry.family for entry in ZOO.values()):
        names = [name for name in done if ZOO[name].family == family]
        equal = sum(all(o.difference == 0 for o in done[name]) for name in names)
        lines += [
            "",
            f"## {family}",
            "",
            f"{len(names)} models, {equal} of them with equal bits everywhere.",
            "",
            "| Model | Parameters | float32, 2 partitions | float32, 4 partitions "
            "| float64, 2 partitions | float64, 4 partitions | Plain step, s | Split step, s |",
            "|---|--:|--:|--:|--:|--:|--:|--:|",
            *(row(name, done[name]) for name in names),
        ]
    return "\n".join(lines)


def row(name: str, outcomes: Sequence[Outcome]) -> str:
    """One line of the table."""
    by_key = {(o.dtype, o.partitions): o for o in outcomes}
    cells = [
        cell(by_key.get((dtype, partitions)), outcomes)
        for dtype in BOUNDS
        for partitions in PARTITIONS
    ]
    first = next((o.details for o in outcomes if "parameters" in o.details), None)
    if first is None:
        return f"| {name} | | {' | '.join(cells)} | | |"
    parameters = f"{sum(first['parameters']):,}"
    seconds = f"{first['plain_seconds']:.0f} | {first['split_seconds']:.0f}"
    return f"| {name} | {parameters} | {' | '.join(cells)} | {seconds} |"


def cell(outcome: Outcome | None, outcomes: Sequence[Outcome]) -> str:
    """A difference; bold where the model is out of bounds."""
    if outcome is None:
        return ""
    if outcome.difference is None:
        return f"**{outcome.failure}**"
    text = "equal bits" if outcome.difference == 0 else f"{outcome.difference:.1e}"
    return text if passed(outcomes, outcome.partitions) else f"**{text}**"


if __name__ == "__main__":
    sys.exit(main())
