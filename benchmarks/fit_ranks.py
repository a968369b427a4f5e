"""What a small batch of `fit` costs in two ranks: processor time beside that of one process.

    python benchmarks/fit_ranks.py

The model is so small that hardly anything is computed. What is measured is what goes on around:
that the ranks compare their batches, and what a step sends. `compare` is the part of the first.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

ROWS, WIDTH = 16, 32


def rank(partitions: int, batches: int, compares: bool) -> None:
    """Prints the milliseconds of processor time that a batch takes here."""
    import keras
    import numpy as np

    import opensmp as smp
    from opensmp.training import step_functions

    smp.init({"partitions": partitions, "microbatches": 1})
    if not compares:
        step_functions.meet_at_batch = lambda *_: None
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(WIDTH, activation="tanh") for _ in range(2)]
    model = smp.DistributedModel.from_keras(
        keras.Sequential([keras.Input((WIDTH,)), *layers, keras.layers.Dense(4)])
    )
    model.compile("sgd", "mse", metrics=["mae"])
    x = np.random.default_rng(0).normal(size=(ROWS * batches, WIDTH)).astype("float32")
    y = np.zeros((len(x), 4), "float32")
    found = []
    for _ in range(6):  # the first one traces
        began = time.process_time()
        model.fit(x, y, batch_size=ROWS, verbose=0, shuffle=False)
        found.append(1e3 * (time.process_time() - began) / batches)
    print(f"MILLISECONDS {statistics.median(found[1:])}")


def measured(size: int, partitions: int, batches: int, compares: bool = True) -> float:
    """Milliseconds of a batch, on average over the ranks."""
    from processes import check_ranks

    arguments = ["--rank", str(partitions), str(batches), str(int(compares))]
    lines = [each.lines[-1] for each in check_ranks(__file__, size, args=arguments)]
    return statistics.mean(float(line.removeprefix("MILLISECONDS ")) for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few batches, one row")
    parser.add_argument("--rank", nargs=3, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        partitions, batches, compares = arguments.rank
        rank(partitions, batches, bool(compares))
        return 0
    batches = 10 if arguments.quick else 200
    rows = {"one replica of two ranks": 2, "two replicas": 1}
    print("                            one process   a rank   of which compare")
    for name, partitions in list(rows.items())[: 1 if arguments.quick else 2]:
        alone = measured(1, partitions, batches)
        together = measured(2, partitions, batches)
        without = measured(2, partitions, batches, compares=False)
        print(
            f"{name:26} {alone:9.2f} ms {together:5.2f} ms ({together / alone:.1f}) "
            f"{together - without:6.2f} ms",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
