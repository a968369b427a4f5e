"""Run by every rank of several processes: uses of a split model, see `uses.py`.

    opensmp run -n 2 --partitions 2 --microbatches 3 shared.py FOLDER arrays dataset

leaves what each use gives in FOLDER.
"""

from __future__ import annotations

import pathlib
import pickle
import sys

from training.uses import USES, record

import opensmp as smp


def main(folder: pathlib.Path, names: list[str]) -> None:
    smp.init()
    for name in names:
        found = record(name, folder / name)
        (folder / f"{name}-{smp.rank()}.pickle").write_bytes(pickle.dumps(found))
        print(f"{name} done", flush=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2:] or list(USES))
