"""Whether memory, threads and open files stay as they are: `python benchmarks/endurance.py`.

Each row does one thing 20,000 times (rounds of `evaluate` and `predict` 1,000, saves 300 times) and
shows at ten points what the processes use, the most of all ranks. With `--quick` two rows some
hundred times, in less than a minute; `--only fit` runs the rows whose names have this word.

Resident memory also has what the allocator keeps for later, so that it grows and shrinks by itself;
"in use" is what it has given out and not got back. A row fails if what is in use grows by more than
60 bytes each time from the second point to the last (400 with `--quick`, and as many for what
makes files), or if threads or files become more.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from processes import check_ranks
from usage import Usage, usage

POINTS = 10
BATCH = 8
STEPS_PER_EPOCH = 100
QUICK_BYTES = 400
MORE_THREADS, MORE_FILES = 2, 2  # TensorFlow starts some threads when it first has much to do
MIB = 1 << 20

Repeat = Callable[[int], None]


class Row(NamedTuple):
    """One thing that is done over and over.

    Attributes:
        name: What it is.
        what: Name of the function of this file that does it.
        ranks: Number of processes.
        config: Keys of the configuration.
        times: How often.
        quick: How often with `--quick`; 0 leaves the row out there.
        most_bytes: What each time may leave behind.
    """

    name: str
    what: str
    ranks: int
    config: Mapping[str, Any] = MappingProxyType({})
    times: int = 20_000
    quick: int = 0
    most_bytes: int = 60


ONE = {"partitions": 1}  # and a replica in each rank

ROWS = [
    Row("smp.step, one process", "step", 1),
    Row("fit, one process", "fit", 1),
    Row("smp.step, 2 ranks", "step", 2, quick=800),
    Row("smp.step, 2 ranks, collective", "step", 2, {"transport": "collective"}),
    Row("smp.step, 2 replicas", "step", 2, ONE),
    Row("fit, 2 ranks", "fit", 2, quick=1000),
    Row("fit, 2 replicas", "fit", 2, ONE),
    Row("smp.barrier, 2 ranks", "barrier", 2),
    Row("smp.allgather, 2 ranks", "allgather", 2),
    # Plain Keras leaves some 1,700 bytes with each call of evaluate.
    Row("evaluate and predict, 2 ranks", "look", 2, times=1000, most_bytes=6000),
    Row("CheckpointManager.save, 2 ranks", "save", 2, times=300, most_bytes=400),
]


# ------------------------------------------------------------------------- what is repeated


def step(smp: Any) -> Repeat:
    """Training steps in a tf.function."""
    import keras
    import tensorflow as tf

    model, optimizer = _model(smp), keras.optimizers.Adam()

    @smp.step
    def forward_backward(x: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x, training=True) ** 2)
        return tape.gradient(loss, model.trainable_variables), loss

    @tf.function
    def train(x: Any) -> Any:
        gradients, loss = forward_backward(x)
        gradients = [smp.allreduce(g.accumulate()) for g in gradients]
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss.reduce_mean()

    x = tf.ones([BATCH, 8])

    def repeat(times: int) -> None:
        for _ in range(times):
            float(train(x))

    return repeat


def fit(smp: Any) -> Repeat:
    """Batches of fit."""
    import numpy as np

    model, rows = _compiled(smp), STEPS_PER_EPOCH * BATCH
    x, y = np.ones([rows, 8], "float32"), np.ones([rows, 3], "float32")
    return lambda times: model.fit(  # type: ignore[no-any-return]
        x, y, batch_size=BATCH, epochs=times // STEPS_PER_EPOCH, verbose=0
    )


def barrier(smp: Any) -> Repeat:
    """Barriers."""

    def repeat(times: int) -> None:
        for _ in range(times):
            smp.barrier()

    return repeat


def allgather(smp: Any) -> Repeat:
    """Objects with numbers that do not come again."""
    numbers = itertools.count()

    def repeat(times: int) -> None:
        for number in itertools.islice(numbers, times):
            smp.allgather((number, number / 7), smp.WORLD)

    return repeat


def look(smp: Any) -> Repeat:
    """Rounds of evaluate and predict."""
    import numpy as np

    model = _compiled(smp)
    x, y = np.ones([2 * BATCH, 8], "float32"), np.ones([2 * BATCH, 3], "float32")

    def repeat(times: int) -> None:
        for _ in range(times):
            model.evaluate(x, y, batch_size=BATCH, verbose=0)
            model.predict(x, batch_size=BATCH, verbose=0)

    return repeat


def save(smp: Any) -> Repeat:
    """Checkpoints, of which two are kept."""
    import tensorflow as tf

    model = _model(smp)
    model(tf.ones([BATCH, 8]))
    folder = smp.allgather(tempfile.mkdtemp(dir=sys.argv[2]))[0]
    checkpoint = tf.train.Checkpoint(model=model)
    manager = smp.CheckpointManager(checkpoint, folder, max_to_keep=2)

    def repeat(times: int) -> None:
        for _ in range(times):
            manager.save()

    return repeat


def _model(smp: Any) -> Any:
    import keras

    keras.utils.set_random_seed(0)
    inputs = keras.Input((8,))
    hidden = keras.layers.Dense(16, "relu")(keras.layers.Dense(16, "relu")(inputs))
    return smp.DistributedModel.from_keras(keras.Model(inputs, keras.layers.Dense(3)(hidden)))


def _compiled(smp: Any) -> Any:
    model = _model(smp)
    model.compile("adam", "mse", metrics=["mae"])
    return model


# ------------------------------------------------------------------------------ in the ranks


def work(row: Row, config: dict[str, Any], times: int, folder: Path) -> None:
    """Runs a row in this rank, and leaves what it used at each point in the folder."""
    import opensmp as smp

    smp.init(config)
    repeat = globals()[row.what](smp)
    points = []
    for _ in range(POINTS):
        repeat(times // POINTS)
        gc.collect()
        smp.barrier()
        points.append(usage())
    (folder / f"{smp.rank()}.json").write_text(json.dumps(points))


# --------------------------------------------------------------------------------- the table


def measure(row: Row, times: int) -> list[Usage]:
    """What the processes use at each point: of each thing the most of all ranks."""
    config = {"partitions": 2, "microbatches": 2, **row.config}
    with tempfile.TemporaryDirectory() as folder:
        given = [ROWS.index(row), folder, json.dumps(config), times]
        own = row.ranks > 1  # without the launcher's variables it is a process of its own
        check_ranks(__file__, row.ranks, args=given, seconds=7200, own_variables=own)
        ranks = [
            [Usage(*point) for point in json.loads((Path(folder) / f"{r}.json").read_text())]
            for r in range(row.ranks)
        ]
    return [Usage(*map(max, zip(*points, strict=True))) for points in zip(*ranks, strict=True)]


def faults(row: Row, points: list[Usage], times: int, most_bytes: int) -> list[str]:
    """What has grown; empty if nothing has."""
    first, last = points[1], points[-1]
    found = []
    bytes_each = growth(points, times)
    if bytes_each > most_bytes:
        found.append(f"{row.name}: each leaves {bytes_each:.0f} bytes, more than {most_bytes}")
    if last.threads > first.threads + MORE_THREADS:
        found.append(f"{row.name}: {first.threads} threads became {last.threads}")
    if last.descriptors > first.descriptors + MORE_FILES:
        found.append(f"{row.name}: {first.descriptors} files became {last.descriptors}")
    return found


def growth(points: list[Usage], times: int) -> float:
    """Bytes in use that each time has left behind, from the second point to the last."""
    count = times * (len(points) - 2) / len(points)
    return (points[-1].allocated_bytes - points[1].allocated_bytes) / count


def table_row(row: Row, points: list[Usage], times: int) -> str:
    """A row of the table: all ten points, one after the other."""
    cells = [
        row.name,
        f"{times:,}",
        " ".join(f"{p.resident_bytes / MIB:.0f}" for p in points),
        " ".join(f"{p.allocated_bytes / MIB:.2f}" for p in points),
        f"{growth(points, times):.0f}",
        " ".join(str(p.threads) for p in points),
        " ".join(str(p.descriptors) for p in points),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Prints the table and says whether anything grows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="two rows, some hundred times")
    parser.add_argument("--only", default="", help="rows whose names have this")
    arguments = parser.parse_args()
    print("| what | times | resident MiB | in use MiB | bytes each | threads | files |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    found = []
    for row in ROWS:
        times = row.quick if arguments.quick else row.times
        if not times or arguments.only not in row.name:
            continue
        points = measure(row, times)
        print(table_row(row, points, times), flush=True)
        most = max(QUICK_BYTES, row.most_bytes) if arguments.quick else row.most_bytes
        found += faults(row, points, times, most)
    if found:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    if len(sys.argv) > 4:
        number, folder, config, count = sys.argv[1:]
        work(ROWS[int(number)], json.loads(config), int(count), Path(folder))
    else:
        main()
