"""What `shard_optimizer_state` saves in memory, and costs in time, with replicas of a model.

    python benchmarks/optimizer_shards.py
    python benchmarks/optimizer_shards.py --layers 4 --units 1024 --replicas 2

Trains an MLP with Adam in N ranks, each a replica of the whole model, without the key and with it,
in turns, each time in fresh processes, and reads of each rank

- the bytes of weights and slots that have memory,
- the peak of the resident memory (VmHWM) and of the data (VmData),
- the time of a step, and the processor time of a step: both medians of the steps after the first.

Then a limit is set on the memory that a process may have (RLIMIT_DATA), between what the ranks took
without the key and with it: without it they fail, with it they train.

Prediction, written before the first measurement, for 8 layers of 2048 (128 MiB of weights) and two
replicas: slots of 128 instead of 256 MiB in each rank; a peak that is 100 MiB lower, since the
gathers hold two rounds of weights (2 x 2 x 16 MiB), mostly where gradients were before; steps that
take 5 to 15 % longer, since 64 MiB leave each rank beside the 128 MiB of the gradients, while each
rank does half of Adam's work.

Found: the slots as predicted, and no lower peak (1974 instead of 1946 MiB); two rounds in flight
are half of such a model. With 24 layers the peak falls by
143 of 384 MiB, and the data by 1 %, so that the limit shows no gain.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from memory import status

BATCH = 64
STEPS = 5
MEBI = 1 << 20


class Found(NamedTuple):
    """What a rank took; bytes and seconds."""

    variables: int
    peak: int
    data: int
    step: float
    processor: float
    loss: str


def serve(layers: int, units: int, sharded: bool, limit: int | None) -> None:
    """Trains in this process, which is one of several replicas, and prints what it took."""
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    import keras
    import tensorflow as tf

    import models
    import opensmp as smp

    smp.init({"microbatches": 2, "devices": "cpu", "shard_optimizer_state": sharded})
    keras.utils.set_random_seed(0)
    inputs = x = keras.Input((units,))
    for _ in range(layers):
        x = keras.layers.Dense(units, activation="relu")(x)
    model = smp.DistributedModel.from_keras(keras.Model(inputs, keras.layers.Dense(4)(x)))
    optimizer = keras.optimizers.Adam(1e-4)
    train_step = models.split_step(model, optimizer, reduce=smp.allreduce)
    rows = BATCH // smp.dp_size()
    x = tf.random.stateless_normal([BATCH, units], [1, 2])[smp.dp_rank() * rows :][:rows]
    y = tf.zeros([rows], tf.int32)
    times, processor = [], []
    for _ in range(STEPS):
        began = time.perf_counter(), time.process_time()
        loss = float(train_step(x, y))
        times.append(time.perf_counter() - began[0])
        processor.append(time.process_time() - began[1])
    here = smp.local_variables([*model.variables, *optimizer.variables])
    size = sum(variable.numpy().nbytes for variable in here)
    print(
        f"RESULT {smp.rank()} {size} {status('VmHWM')} {status('VmData')} "
        f"{statistics.median(times[2:])} {statistics.median(processor[2:])} {loss:.9g}",
        flush=True,
    )


def run(
    replicas: int, layers: int, units: int, sharded: bool, limit: int | None = None
) -> tuple[int, list[Found], str]:
    """Exit code, what each rank took, and all output."""
    command = [sys.executable, "-m", "opensmp", "run", "-n", str(replicas), "--partitions", "1"]
    command += ["--all-output", __file__, "--serve", str(layers), str(units), str(int(sharded))]
    command += [] if limit is None else ["--limit", str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    output = done.stdout + done.stderr
    rows = sorted(re.findall(r"RESULT (\d+ .*)", output), key=lambda row: int(row.split()[0]))
    found = []
    for row in rows:
        _, variables, peak, data, step, processor, loss = row.split()
        sizes = int(variables), int(peak), int(data)
        found.append(Found(*sizes, float(step), float(processor), loss))
    return done.returncode, found, output


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--units", type=int, default=2048)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", type=int, nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        layers, units, sharded = arguments.serve
        serve(layers, units, bool(sharded), arguments.limit)
        return 0
    model = arguments.replicas, arguments.layers, arguments.units
    found: dict[bool, list[list[Found]]] = {False: [], True: []}
    for _ in range(arguments.rounds):
        for sharded, rounds in found.items():
            code, ranks, output = run(*model, sharded)
            if code or len(ranks) != arguments.replicas:
                raise SystemExit(f"the ranks ended with {code}:\n{output[-3000:]}")
            rounds.append(ranks)
    losses = {rank.loss for rounds in found.values() for ranks in rounds for rank in ranks}
    print("| shard_optimizer_state | variables | peak | data | step | processor time |")
    print("| --- | --- | --- | --- | --- | --- |")
    data = {}
    for sharded, rounds in found.items():
        most = [[max(rank[i] for rank in ranks) for ranks in rounds] for i in range(5)]
        variables, peak, data[sharded], step, processor = map(statistics.median, most)
        print(
            f"| {sharded} | {variables / MEBI:.0f} MiB | {peak / MEBI:.0f} MiB | "
            f"{data[sharded] / MEBI:.0f} MiB | {1e3 * step:.0f} ms | {1e3 * processor:.0f} ms |",
            flush=True,
        )
    limit = int(data[False] + data[True]) // 2
    codes = {sharded: run(*model, sharded, limit)[0] for sharded in found}
    print(
        f"\nUnder a limit of {limit / MEBI:.0f} MiB of data a rank, the ranks "
        + " and ".join(
            f"{'train' if code == 0 else 'fail'} {'with' if sharded else 'without'} the key"
            for sharded, code in codes.items()
        )
        + "."
    )
    is_good = len(losses) == 1 and codes[True] == 0 != codes[False]
    if len(losses) > 1:
        print(f"The losses differ: {losses}")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
