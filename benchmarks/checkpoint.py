"""Saving and loading 1 GiB of weights: seconds and memory, against plain Keras and TensorFlow.

    python benchmarks/checkpoint.py

Each row is a fresh process (two for the row that says so) with the same MLP:

- Keras: `model.save_weights("x.weights.h5")` and `load_weights`;
- TensorFlow: `tf.train.CheckpointManager`;
- opensmp: `smp.CheckpointManager`, with one and two partitions, and two processes.

`save` is until the call returns, `on the disk` until the files are there as well (`fsync`), which
`smp.CheckpointManager` waits for and the others do not. Files are read from the page cache.
Memory is the peak of the resident memory during the first call, less what there was before it;
with two processes, the larger one of them. TensorFlow keeps memory that it has once had. Times are
medians without the first call.

Then a model trains while `smp.CheckpointManager(..., background=True)` writes. What that costs is
all the time that training loses: a number of steps with a save, the call included, until the
checkpoint is on the disk, less the same number of steps without one just before and after.
"Stopped" is the part of it in which training waits: the call, and what the first step takes
longer, which copies what the thread has not copied yet; the rest is that steps are slower while
something else uses the memory and the cores. Training should be stopped for at most 10 % of the
time of plain Keras until the file is on the disk. With two
partitions, saving and loading should not be slower than plain Keras, both until on the disk.

A step of this model reads and writes its weights some six times and does little else, so that it
needs what a save in the background needs: the bandwidth of the memory. It uses all cores; one row
has training with one thread, so that a core is left. The times are medians, and the quartiles of
what is lost in brackets.

Prediction, written before the first measurement: writing to the disk (300 MB/s) is most of the
time of everybody, about 3.5 s; saving takes opensmp 0.9 of Keras' time, since two threads make
checksums, and loading 0.5 of it. Saving takes less than 50 MiB of memory, loading takes 1 GiB, for
everything is read before anything is assigned. Background saving stops training for 5 %: 0.01 s
for `save`, 0.15 s for the copies.

What came out otherwise: the disk takes 1 GB/s and more, so that the whole save takes 0.9 s; two
threads were no faster than one, and often slower, and are gone; the copies took 0.26 s, and the
write 0.4 s of both cores, so that training lost 0.5 s, half of Keras' time. A copy to memory that
has been used before took 0.04 s, and TensorFlow's writer at low priority 0.15 s, of which the page
cache had most. Prediction for such a copy, files written past the page cache at 0.06 s, and
checksums at low priority at 0.02 s: training loses 0.13 s with all cores in use, 12 %, and 8 %
when a core is left. Found: 0.14 and 0.17 s in two runs, 13 and 20 % (Keras took 1.07 and 0.84 s);
0.04 and 0.12 s with a core left. A third of it was new room on the disk, and another third giving
back that of the old checkpoint; written over the files of the old one, training loses 0.06 and
0.12 s in two runs, 8 and 12 %, of which it is stopped for 0.08 s, 8 %.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

MEBI = 1 << 20
STOP_TARGET = 0.10
SPEED_TARGET = 1.0
ROWS = {
    "Keras, .weights.h5": ("keras", 1, 1),
    "TensorFlow": ("tensorflow", 1, 1),
    "opensmp, 1 partition": ("opensmp", 1, 1),
    "opensmp, 2 partitions": ("opensmp", 2, 1),
    "opensmp, 2 partitions in 2 processes": ("opensmp", 2, 2),
}
BACKGROUND_ROWS = {
    "training with all cores": "background",
    "training with one thread": "background-one-thread",
}
QUICK_ROWS = ("Keras, .weights.h5", "opensmp, 2 partitions")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--units", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where files are written; a temporary one by default")
    parser.add_argument("--quick", action="store_true", help="few weights, one round, no target")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.layers, arguments.units, arguments.rounds = 4, 256, 1
    if arguments.serve:
        kind, partitions = arguments.serve
        serve(kind, int(partitions), arguments)
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        arguments.folder = folder
        return compare(arguments)


def compare(arguments: argparse.Namespace) -> int:
    """Runs all rows, prints the table, gives the exit code."""
    weights = arguments.layers * arguments.units * (arguments.units + 1) * 4
    print(
        f"{os.cpu_count()} cores, {weights / MEBI:.0f} MiB of weights, {arguments.rounds} rounds\n"
    )
    print("| | save | on the disk | memory | load | memory |")
    print("| --- | --- | --- | --- | --- | --- |")
    found = {}
    for row, (kind, partitions, processes) in ROWS.items():
        if arguments.quick and row not in QUICK_ROWS:
            continue
        found[row] = m = measured(kind, partitions, processes, arguments)
        print(
            f"| {row} | {m['save']:.2f} s | {m['disk']:.2f} s | {m['save_bytes'] / MEBI:.0f} MiB | "
            f"{m['load']:.2f} s | {m['load_bytes'] / MEBI:.0f} MiB |",
            flush=True,
        )
    plain = found["Keras, .weights.h5"]
    print(
        "\n| saved in the background | a step | `save` | first step | stopped, of Keras | "
        "lost in all | of Keras | on the disk | memory |\n|" + 9 * " --- |"
    )
    shares = {}
    for row, kind in BACKGROUND_ROWS.items():
        b = measured(kind, 2, 1, arguments)
        shares[row] = (b["save"] + b["first"]) / plain["disk"]
        print(
            f"| {row} ({b['cores']:.1f} cores) | {b['step']:.2f} s | {1e3 * b['save']:.0f} ms | "
            f"{1e3 * b['first']:+.0f} ms | {100 * shares[row]:.0f} % "
            f"| {b['lost']:.2f} s ({b['least']:.2f} to {b['most']:.2f}) "
            f"| {100 * b['lost'] / plain['disk']:.0f} % "
            f"| {b['disk']:.2f} s | {b['save_bytes'] / MEBI:.0f} MiB |",
            flush=True,
        )
    print()
    if arguments.quick:
        return 0
    two = found["opensmp, 2 partitions"]
    failed = [
        f"{name}: {two[key] / plain[key]:.2f} of the time of Keras"
        for name, key in (("saving", "disk"), ("loading", "load"))
        if two[key] / plain[key] > SPEED_TARGET
    ]
    failed += [
        f"background saving, {row}: training is stopped for {100 * share:.0f} %"
        for row, share in shares.items()
        if share > STOP_TARGET
    ]
    print("\n".join(failed) or "all targets are met")
    return 1 if failed else 0


def measured(
    kind: str, partitions: int, processes: int, arguments: argparse.Namespace
) -> dict[str, float]:
    """What a fresh process, or several, found; the largest of each number."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "opensmp", "run", "-n", str(processes), "--all-output"]
    command += [__file__, "--serve", kind, str(partitions), "--folder", arguments.folder]
    for name in ("layers", "units", "rounds"):
        command += [f"--{name}", str(getattr(arguments, name))]
    one = {f"TF_NUM_{pool}_THREADS": "1" for pool in ("INTRAOP", "INTEROP")}
    environ = os.environ | (one if kind == "background-one-thread" else {})
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    results = [json.loads(text) for text in re.findall(r"RESULT (\{.*?\})", done.stdout)]
    if done.returncode or len(results) != processes:
        raise SystemExit(f"{kind} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return {name: max(result[name] for result in results) for name in results[0]}


# ----------------------------------------------------------------------------- in the processes


def serve(kind: str, partitions: int, arguments: argparse.Namespace) -> None:
    """Measures one row in this process, and prints it."""
    import keras
    import tensorflow as tf

    import opensmp as smp

    if kind not in ("keras", "tensorflow"):
        smp.init({"partitions": partitions, "microbatches": 1, "devices": "cpu"})
    split = smp.is_initialized()

    class Net(smp.DistributedModel if split else keras.Model):
        def __init__(self) -> None:
            super().__init__()
            for number in range(arguments.layers):
                setattr(self, f"dense_{number}", keras.layers.Dense(arguments.units))

        def call(self, x, training=None):
            for number in range(arguments.layers):
                x = getattr(self, f"dense_{number}")(x)
            return x

    keras.utils.set_random_seed(0)
    x = tf.ones([4, arguments.units])
    model = Net()
    model(x)
    folder = Path(arguments.folder, f"{kind}-{partitions}")
    folder.mkdir(exist_ok=True)
    if kind.startswith("background"):
        print("RESULT", json.dumps(training(model, x, folder, arguments.rounds)), flush=True)
        return
    if kind == "keras":
        path = folder / "x.weights.h5"
        save, load = (lambda: model.save_weights(path)), (lambda: model.load_weights(path))
    else:
        kind_of_manager = smp.CheckpointManager if split else tf.train.CheckpointManager
        checkpoint = tf.train.Checkpoint(model=model)
        manager = kind_of_manager(checkpoint, str(folder), max_to_keep=1)
        save, load = manager.save, lambda: checked(checkpoint, manager, split)
    times: dict[str, list[float]] = {name: [] for name in ("save", "disk", "load")}
    peaks: dict[str, int] = {}
    for number in range(arguments.rounds + 1):  # the first one warms up
        on_disk(folder)
        seconds, peak = watched(save)
        begin = time.perf_counter()
        on_disk(folder)
        disk = seconds + time.perf_counter() - begin
        load_seconds, load_peak = watched(load)
        if number == 0:
            peaks = {"save_bytes": peak, "load_bytes": load_peak}
        else:
            for name, value in (("save", seconds), ("disk", disk), ("load", load_seconds)):
                times[name].append(value)
    result = {name: statistics.median(values) for name, values in times.items()}
    print("RESULT", json.dumps(result | peaks), flush=True)


def checked(checkpoint, manager, split: bool) -> None:
    if split:
        manager.restore()
    else:
        checkpoint.restore(manager.latest_checkpoint).assert_existing_objects_matched()


def training(model, x, folder: Path, rounds: int) -> dict[str, float]:
    """Trains while checkpoints are written."""
    import keras
    import tensorflow as tf

    import opensmp as smp

    optimizer = keras.optimizers.SGD(1e-6)

    @smp.step
    def forward_backward(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True)))
        return tape.gradient(loss, model.trainable_variables)

    @tf.function
    def train_step(x):
        gradients = [gradient.accumulate() for gradient in forward_backward(x)]
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return tf.reduce_sum(gradients[0])

    def step() -> float:
        begin = time.perf_counter()
        float(train_step(x))
        return time.perf_counter() - begin

    manager = smp.CheckpointManager(
        tf.train.Checkpoint(model=model), folder, max_to_keep=1, background=True
    )

    def steps(count: int) -> list[float]:
        return [step() for _ in range(count)]

    def until_written() -> tuple[int, float]:
        begin = time.perf_counter()
        path = manager.save()
        meanwhile = 0
        while manager.latest_checkpoint != path:
            meanwhile += len(steps(1))
        return meanwhile, time.perf_counter() - begin

    steps(5)
    before = status("VmRSS")
    reset_peak()
    until_written()  # it also gets the memory for the next ones
    peak = status("VmHWM") - before
    while_written, disk = until_written()
    count = 3 * while_written // 2 + 1
    cores = time.process_time(), time.perf_counter()
    without = [steps(count)]
    cores = (time.process_time() - cores[0]) / (time.perf_counter() - cores[1])
    calls, firsts, lost = [], [], []
    for _ in range(4 * rounds):
        begin = time.perf_counter()
        manager.save()
        calls.append(time.perf_counter() - begin)
        meanwhile = steps(count)
        manager.wait()  # it is written by now; if not, the wait counts
        took = time.perf_counter() - begin
        without.append(steps(count))
        around = without[-2:]
        lost.append(took - statistics.mean(sum(each) for each in around))
        firsts.append(meanwhile[0] - statistics.median(around[0] + around[1]))
    quartiles = statistics.quantiles(lost, n=4)
    return {
        "step": statistics.median(sum(each) / count for each in without),
        "cores": cores,
        "save": statistics.median(calls),
        "first": statistics.median(firsts),
        "least": quartiles[0],
        "lost": statistics.median(lost),
        "most": quartiles[2],
        "disk": disk,
        "save_bytes": peak,
    }


def watched(call: Callable[[], object]) -> tuple[float, int]:
    """Seconds of a call, and by how many bytes the resident memory grew at most."""
    before = status("VmRSS")
    reset_peak()
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin, status("VmHWM") - before


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def status(key: str) -> int:
    """A line of this process' status, in bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{key}:\s+(\d+) kB", text).group(1))


def on_disk(folder: Path) -> None:
    """Waits until all files of a directory are on the disk."""
    for file in (*folder.glob("*"), folder):
        number = os.open(file, os.O_RDONLY)
        os.fsync(number)
        os.close(number)


if __name__ == "__main__":
    sys.exit(main())
