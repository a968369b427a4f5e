"""Run by every rank of several processes: cases of the parity suite, spread over them.

    opensmp run -n 2 ranks.py FOLDER "MLP;P2-M4-interleaved-blocks" "LSTM;...;exact" ...

Each rank leaves what it has of each case in FOLDER. `merged` puts the parts together.
"""

from __future__ import annotations

import pathlib
import pickle
import re
import sys
import traceback
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from parity.layout import Layout
from parity.records import Record, Sparse, compare


def layout_of(text: str) -> Layout:
    """The layout that prints as `text`."""
    partitions, microbatches, pipeline, pattern, speed = re.fullmatch(
        r"P(\d+)-M(\d+)-(\w+)-([a-z]+)(-speed)?", text
    ).groups()
    optimize = "speed" if speed else "memory"
    return Layout(int(partitions), int(microbatches), pipeline, pattern, optimize)


def merged(parts: list[Record]) -> tuple[Record, list[str]]:
    """One record of the parts that the ranks have, and where two ranks disagree."""
    whole: Record = {}
    disagreements: list[str] = []
    for rank, part in enumerate(parts):
        for key, value in part.items():
            if isinstance(value, Sparse) and not len(value.values):
                continue  # stands for a gradient that another rank has
            if key not in whole:
                whole[key] = value
                continue
            differences = compare({key: whole[key]}, {key: value})
            disagreements += [f"rank {rank}: {difference}" for difference in differences]
    return whole, disagreements


def main(folder: pathlib.Path, wanted: list[str]) -> None:
    from parity.cases import CASES
    from parity.runs import run_split

    import opensmp as smp

    by_name = {case.name: case for case in CASES}
    smp.init(layout_of(wanted[0].split(";")[1]).config)
    for number, one in enumerate(wanted):
        name, layout, *exact = one.split(";")
        result: Any
        try:
            result = run_split(by_name[name], layout_of(layout), exact=bool(exact))
        except Exception:  # the others of this rank go on; whoever compares will fail
            result = traceback.format_exc()
            print(result, flush=True)
        path = folder / f"{number}-{smp.rank()}.pickle"
        path.write_bytes(pickle.dumps(result))
        print(f"{one} done", flush=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2:])
