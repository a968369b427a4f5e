"""Run by every rank: programs one after the other, each with an outcome in a file of its own.

    opensmp run -n 2 --partitions 2 --microbatches 2 ranks.py FOLDER wgan_gp maml

A program that fails does not keep the next one from running.
"""

from __future__ import annotations

import gc
import json
import pathlib
import sys
import time

import keras
from programs.catalogue import PROGRAMS
from programs.running import run
from programs.wrap import Wrap

import opensmp as smp


def main(folder: pathlib.Path, names: list[str]) -> None:
    smp.init()
    for name in names:
        began = time.monotonic()
        outcome = run(PROGRAMS[name], Wrap())
        smp.barrier()  # or all end here, and the next start leaves this program out
        file = folder / f"{name}-{smp.rank()}.json"
        file.with_suffix(".part").write_text(json.dumps(outcome))
        file.with_suffix(".part").rename(file)
        print(f"{name} {outcome.error or 'ran'} {time.monotonic() - began:.1f} s", flush=True)
        keras.backend.clear_session()
        gc.collect()


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2:] or list(PROGRAMS))
