"""How much memory each of several processes needs for a model, against one process alone.

    python benchmarks/memory.py
    python benchmarks/memory.py --growth       # against the number of microbatches
    python benchmarks/memory.py --recompute    # with recomputation of activations
    python benchmarks/memory.py --offload      # with residuals in files; --quick for a small one
    python benchmarks/memory.py --transformer  # beside one plain process, and one of torch
    python benchmarks/memory.py --quick        # a small Transformer

Trains an MLP with Adam for some steps, each time in fresh processes, and reads the peak of the
resident memory (VmHWM) of each rank:

- base: a model of a few bytes, which leaves TensorFlow itself;
- one: the model in one process, one partition;
- ranks: the same with P partitions in P processes.

The model's share of a process is its peak less the base. A rank should need at most
1/P + 15 % of the share of the one process.

Then a limit is set on the memory that a process may have (RLIMIT_DATA), for a model twice as wide:
one process fails under it, four ranks train under it. The limit is a quarter above what a rank
takes without one; a process that takes more without a limit may do with less.

Prediction, written before the first measurement: 1/P + 8 %, for activations of microbatches in
flight and the buffers of what travels.

With --growth: an MLP of 8 layers of 1024 in two ranks, 1024 rows a microbatch (an activation has
4 MiB), for each schedule and 4, 16 and 32 microbatches: the memory that the ranks share, and what
the first steps take beyond what is there after tracing. Both once as the launcher sets glibc, which
keeps freed memory for the next step, and once with large tensors mapped one by one, which shows
what is in use. Before tensors shared buffers, the shared memory was two buffers for each tensor:
64, 256 and 512 MiB (the limit), and the steps of `interleaved` took 186, 464 and 747 MiB.
Predicted: flat for all but `simple`. Found for `interleaved`: shared 48 MiB throughout, in use 159,
167 and 181 MiB, so flat but for the graph of more calls; but 179, 259 and 331 MiB as the launcher
sets glibc, since what is freed between the tensors that arrive is not used again.

With --recompute: a Transformer of 8 blocks of 256 in two ranks, 8 microbatches of 4 sequences of
256, for each level of `recompute`: what a microbatch keeps, counted in the lowered functions, and
the peak of the larger rank above that after the imports. Then the limit as above, a quarter of the
way from what "full" takes to what "none" takes: without recomputation the run fails under it.
Predicted, written before the first
measurement: "selective" keeps a third of "none", "full" 1 to 2 %; with 4 microbatches in flight,
of which one passes through memory whole at any level, the peaks are 1/2 and 1/3 of that of "none".
Found: a microbatch keeps 123, 41 and 1 MiB, as predicted; the peaks are 846, 667 and 602 MiB, 0.79
and 0.71 of that of "none": less falls away than predicted, since the graph, weights, gradients and
what one microbatch needs at any level (about 550 MiB in all) stay. Under the limit "none" fails and
"full" trains.

With --offload: the same Transformer and microbatches, once all in flight (`simple`) and once few
(`interleaved`), without and with `offload="residuals"` into the folder for temporary files: the
peak of the larger rank above that after the imports, and the time of a step, of the clock and of
the processor, as ratios. Then the limit as above, between what the two take with `simple`.
Found: 1459 and 820 MiB with `simple`, 627 and 638 with `interleaved`, where too few
microbatches are in flight to offload any; under the limit the run without fails and the other
trains.

With --transformer: 8 blocks of 256, length 128, batch 32 in microbatches, SGD, in two ranks for
each schedule; in one plain process that calls a `tf.function` for each microbatch and adds up; and
in one process of torch, if that is installed. The share is the peak less what is there after the
imports; "traced" is what of it is there before the first step. A rank should need at most 60 % of
the share of the plain process.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

ALLOWED = 0.15
TRANSFORMER_SHARE = 0.6
PIPELINES = ("simple", "interleaved", "zero_bubble")
QUICK = (2, 32, 16, 50, 8)  # blocks, width, length, words, batch
MICROBATCHES = 4
BATCH = 32
STEPS = 3
RECOMPUTE_MICROBATCHES = 8
OFFLOAD_MICROBATCHES = 8
MAPPED = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}  # shows what is in use


def serve_growth(pipeline: str, microbatches: int) -> None:
    """Trains in one of two processes, and prints the memory of steps and what is shared."""
    import keras
    import tensorflow as tf

    import models
    import opensmp as smp

    smp.init({"microbatches": microbatches, "pipeline": pipeline, "devices": "cpu"})
    keras.utils.set_random_seed(0)
    inputs = x = keras.Input((1024,))
    for _ in range(8):
        x = keras.layers.Dense(1024, activation="tanh")(x)
    model = smp.DistributedModel.from_keras(keras.Model(inputs, keras.layers.Dense(4)(x)))
    train_step = models.split_step(model, keras.optimizers.SGD(0.01))
    x, y = tf.zeros([1024 * microbatches, 1024]), tf.zeros([1024 * microbatches], tf.int32)
    train_step.get_concrete_function(x, y)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    for _ in range(STEPS):
        train_step(x, y)
    maps = Path("/proc/self/maps").read_text()
    spans = re.findall(r"^(\w+)-(\w+) .*memfd:opensmp", maps, re.MULTILINE)
    shared = sum(int(end, 16) - int(start, 16) for start, end in spans)
    print(f"RESULT {smp.rank()} {status('VmHWM') - before} {shared} 0", flush=True)


def show_growth(counts: Sequence[int] = (4, 16, 32)) -> None:
    """Prints a row for each schedule and number of microbatches."""
    print("| schedule | microbatches | shared | steps, of rank 0 | of rank 1 | in use |")
    print("| --- | --- | --- | --- | --- | --- |")
    for pipeline in PIPELINES:
        for microbatches in counts:
            serve = ["--serve-growth", pipeline, str(microbatches)]
            found = []
            for mapped in ({}, {"MALLOC_MMAP_THRESHOLD_": "1000000"}):
                code, ranks, output = launched(2, serve, {**os.environ, **mapped})
                if code or len(ranks) != 2:
                    raise SystemExit(f"the ranks ended with {code}:\n{output[-3000:]}")
                found.append([[number >> 20 for number in rank[:2]] for rank in ranks])
            ((first, shared), (second, other)), used = found
            print(
                f"| {pipeline} | {microbatches} | {max(shared, other)} MiB | {first} MiB | "
                f"{second} MiB | {max(rank[0] for rank in used)} MiB |",
                flush=True,
            )


def workload(size: str) -> Any:
    import models

    blocks, width, length, words, batch = (8, 256, 128, 2000, 32) if size == "full" else QUICK
    return models.transformer(blocks, width, length, words, batch)


def serve_plain(size: str, microbatches: int) -> None:
    """Trains the Transformer in plain Keras, a microbatch at a time, and prints the memory."""
    import keras
    import tensorflow as tf

    import models

    imports = status("VmRSS")
    chosen, loss_fn = workload(size), models.loss_function()
    model, optimizer = chosen.build(), keras.optimizers.SGD(1e-3)

    @tf.function
    def forward_backward(x, y):
        with tf.GradientTape() as tape:
            loss = loss_fn(y, model(x, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        return [tf.convert_to_tensor(gradient) for gradient in gradients]

    @tf.function
    def add(sums, terms):
        return [a + b for a, b in zip(sums, terms, strict=True)]

    x, y = tf.constant(chosen.inputs), tf.constant(chosen.labels)
    parts = list(zip(tf.split(x, microbatches), tf.split(y, microbatches), strict=True))
    forward_backward.get_concrete_function(*parts[0])
    traced = status("VmRSS")
    for _ in range(STEPS):
        sums = None
        for part in parts:
            gradients = forward_backward(*part)
            sums = gradients if sums is None else add(sums, gradients)
            del gradients
        means = [total / microbatches for total in sums]
        optimizer.apply_gradients(zip(means, model.trainable_variables, strict=True))
    print(f"RESULT 0 {status('VmHWM')} {traced} {imports}", flush=True)


def serve_torch(microbatches: int) -> None:
    """The same in torch."""
    import peer_torch

    imports = status("VmRSS")
    step = peer_torch.plain("transformer", microbatches)
    for _ in range(STEPS):
        step()
    print(f"RESULT 0 {status('VmHWM')} {imports} {imports}", flush=True)


def serve_split(size: str, microbatches: int, pipeline: str) -> None:
    """As `serve_plain`, in one of two processes."""
    import keras
    import tensorflow as tf

    import models
    import opensmp as smp

    imports = status("VmRSS")
    smp.init({"microbatches": microbatches, "pipeline": pipeline, "devices": "cpu"})
    chosen = workload(size)
    model = smp.DistributedModel.from_keras(chosen.build())
    train_step = models.split_step(model, keras.optimizers.SGD(1e-3))
    x, y = tf.constant(chosen.inputs), tf.constant(chosen.labels)
    train_step.get_concrete_function(x, y)
    traced = status("VmRSS")
    for _ in range(STEPS):
        train_step(x, y)
    print(f"RESULT {smp.rank()} {status('VmHWM')} {traced} {imports}", flush=True)


def show_transformer(size: str = "full", counts: Sequence[int] = (4, 16)) -> list[str]:
    """Prints a row for each process; returns the ranks that need more than they may."""
    print("| process | microbatches | traced | peak | share | of the plain one |")
    print("| --- | --- | --- | --- | --- | --- |")
    missed = []
    for count in counts:
        plain = ["--serve-plain", size, str(count)]
        ((_, (peak, traced, imports)),) = served("plain", [sys.executable, __file__, *plain])
        share = peak - int(imports)
        show_row("plain", count, peak, traced, imports, share)
        if size == "full" and importlib.util.find_spec("torch"):
            command = [sys.executable, __file__, "--serve-torch", str(count)]
            show_row("torch", count, *served("torch", command)[0][1], share)
        for pipeline in PIPELINES:
            command = [*run_command(2), "--serve-split", size, str(count), pipeline]
            for rank, numbers in served(pipeline, command):
                ratio = show_row(f"{pipeline}, rank {rank}", count, *numbers, share)
                if ratio > TRANSFORMER_SHARE:
                    missed.append(f"{pipeline}, {count} microbatches, rank {rank}: {ratio:.0%}")
    if not importlib.util.find_spec("torch"):
        print("torch is not installed, so its row is left out")
    return missed


def show_row(
    name: str, count: int, peak: int, traced: int, imports: int | str, plain_share: int
) -> float:
    """Prints a row, and returns the ratio of the share to that of the plain process."""
    above, share = traced - int(imports), peak - int(imports)
    print(
        f"| {name} | {count} | {above >> 20} MiB | {peak >> 20} MiB | {share >> 20} MiB | "
        f"{share / plain_share:.0%} |",
        flush=True,
    )
    return share / plain_share


def serve(layers: int, units: int, limit: int | None) -> None:
    """Trains in this process, which may be one of several, and prints its memory."""
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    import keras
    import tensorflow as tf

    import opensmp as smp

    smp.init({"microbatches": MICROBATCHES, "devices": "cpu", "optimize": "memory"})
    keras.utils.set_random_seed(0)

    class Net(smp.DistributedModel):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = [keras.layers.Dense(units, activation="relu") for _ in range(layers)]
            self.top = keras.layers.Dense(1)

        def call(self, x, training=None):
            for layer in self.hidden:
                x = layer(x)
            return self.top(x)

    model, optimizer = Net(), keras.optimizers.Adam(1e-4)

    @smp.step
    def forward_backward(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True)))
        return tape.gradient(loss, model.trainable_variables), loss

    @tf.function
    def train_step(x):
        gradients, loss = forward_backward(x)
        gradients = [gradient.accumulate() for gradient in gradients]
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss.reduce_mean()

    x = tf.random.stateless_normal([BATCH, units], [1, 2])
    for _ in range(STEPS):
        loss = float(train_step(x))
    print(f"RESULT {smp.rank()} {status('VmHWM')} {status('VmData')} {loss:.6g}", flush=True)


def transformer() -> Any:
    import models

    return models.transformer(8, 256, 256, 512, 32)


def kept_by_level(level: str) -> dict[str, int]:
    """Bytes that a microbatch of the Transformer keeps in the larger of two partitions, by type."""
    import keras
    import tensorflow as tf

    from opensmp.compiler.costs.graph_costs import trainable_placeholders
    from opensmp.compiler.lowering.program import Program
    from opensmp.compiler.plan.methods.auto import auto_plan
    from opensmp.compiler.recomputation.census import kept_bytes
    from opensmp.compiler.recomputation.policy import Policy
    from opensmp.compiler.trace.trace import trace

    keras.utils.set_random_seed(0)
    workload = transformer()
    rows = tf.constant(workload.inputs[: len(workload.inputs) // RECOMPUTE_MICROBATCHES])
    traced = trace(workload.build(), (rows,), {"training": True}, name="model")
    plan = auto_plan(traced, 2)
    leaves = trainable_placeholders(traced)
    program = Program(traced, plan, leaves, split_backward=True, recompute=Policy(level))
    return max((kept_bytes(program, p) for p in (0, 1)), key=lambda kept: sum(kept.values()))


def serve_recompute(level: str, limit: int | None) -> None:
    """Trains in one of two processes, and prints its memory above that after the imports."""
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    import keras
    import tensorflow as tf

    import models
    import opensmp as smp

    smp.init({"microbatches": RECOMPUTE_MICROBATCHES, "devices": "cpu", "recompute": level})
    before = status("VmRSS")
    keras.utils.set_random_seed(0)
    workload = transformer()
    model = smp.DistributedModel.from_keras(workload.build())
    train_step = models.split_step(model, keras.optimizers.SGD(0.01))
    x, y = tf.constant(workload.inputs), tf.constant(workload.labels)
    for _ in range(STEPS):
        loss = float(train_step(x, y))
    print(f"RESULT {smp.rank()} {status('VmHWM') - before} {status('VmData')} {loss:.6g}")


def serve_offload(size: str, pipeline: str, level: str, limit: int | None) -> None:
    """Trains in one of two processes, and prints its memory above imports, and times of steps."""
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    import keras
    import tensorflow as tf

    import models
    import opensmp as smp
    from opensmp.execution.memory import offload

    keys = {"pipeline": pipeline, "offload": level, "devices": "cpu"}
    keys["offload_folder"] = tempfile.gettempdir()
    if size == "quick":
        offload.LEAST_BYTES = 1 << 12  # its tensors are small
    smp.init({"microbatches": OFFLOAD_MICROBATCHES, **keys})
    before = status("VmRSS")
    keras.utils.set_random_seed(0)
    chosen = transformer() if size == "full" else workload("quick")
    model = smp.DistributedModel.from_keras(chosen.build())
    train_step = models.split_step(model, keras.optimizers.SGD(0.01))
    x, y = tf.constant(chosen.inputs), tf.constant(chosen.labels)
    loss, times = 0.0, []
    for _ in range(STEPS):
        begun, used = time.perf_counter(), time.process_time()
        loss = float(train_step(x, y))
        times.append((time.perf_counter() - begun, time.process_time() - used))
    wall, processor = (sorted(each)[len(times) // 2] for each in zip(*times[1:], strict=True))
    rest = f"{loss:.9g},{wall:.4f},{processor:.4f}"
    print(f"RESULT {smp.rank()} {status('VmHWM') - before} {status('VmData')} {rest}")


def show_recompute() -> int:
    """Prints a row for each level, and which of them train under a limit."""
    print("| recompute | kept by a microbatch | the most by | peak above imports | loss |")
    print("| --- | --- | --- | --- | --- |")
    data = {}
    for level in ("none", "selective", "full"):
        kept = kept_by_level(level)
        most = ", ".join(f"{kind} {size >> 20} MiB" for kind, size in list(kept.items())[:3])
        code, ranks, output = launched(2, ["--serve-recompute", level], MAPPED)
        if code or len(ranks) != 2:
            raise SystemExit(f"the ranks ended with {code}:\n{output[-3000:]}")
        peak, data[level] = (max(column) for column in list(zip(*ranks, strict=True))[:2])
        print(
            f"| {level} | {sum(kept.values()) / 2**20:.1f} MiB | {most} | {peak >> 20} MiB | "
            f"{ranks[0][2]} |",
            flush=True,
        )
    cap = data["full"] + (data["none"] - data["full"]) // 4
    ended = {}
    for level in ("none", "full"):
        serve = ["--serve-recompute", level, "--limit", str(cap)]
        ended[level], _, _ = launched(2, serve, MAPPED)
    print(f"\nUnder a limit of {cap >> 20} MiB of data a process, exit codes: {ended}")
    return 0 if ended["none"] and not ended["full"] else 1


def show_offload(size: str = "full") -> int:
    """Prints a row for each pipeline and setting, and what trains under a limit."""
    print("| pipeline | offload | peak above imports | step | processor | loss |")
    print("| --- | --- | --- | --- | --- | --- |")
    data, failed = {}, []
    for pipeline in ("simple", "interleaved"):
        base: list[float] = []
        for level in ("none", "residuals"):
            code, ranks, output = launched(2, ["--serve-offload", size, pipeline, level])
            if code or len(ranks) != 2:
                raise SystemExit(f"the ranks ended with {code}:\n{output[-3000:]}")
            peak, data[pipeline, level] = (
                max(column) for column in list(zip(*ranks, strict=True))[:2]
            )
            loss, wall, used = (
                max(each) for each in zip(*(r[2].split(",") for r in ranks), strict=True)
            )
            base = base or [loss, float(wall), float(used)]
            if loss != base[0]:
                failed.append(f"{pipeline}: the loss is {loss} instead of {base[0]}")
            print(
                f"| {pipeline} | {level} | {peak >> 20} MiB | {float(wall) / base[1]:.2f} | "
                f"{float(used) / base[2]:.2f} | {loss} |",
                flush=True,
            )
    if size == "full":
        most, least = data["simple", "none"], data["simple", "residuals"]
        cap = least + (most - least) // 4
        ended = {}
        for level in ("none", "residuals"):
            serve = ["--serve-offload", size, "simple", level, "--limit", str(cap)]
            ended[level] = launched(2, serve)[0]
        print(f"\nUnder a limit of {cap >> 20} MiB of data a process, exit codes: {ended}")
        if not ended["none"] or ended["residuals"]:
            failed.append("the limit does not tell them apart")
    print("\n".join(failed))
    return 1 if failed else 0


def status(key: str) -> int:
    """A line of this process' status, in bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{key}:\s+(\d+) kB", text).group(1))


def run(
    ranks: int, layers: int, units: int, limit: int | None = None
) -> tuple[int, list[tuple[int, int, str]], str]:
    """Exit code; peak resident and data bytes and the loss of each rank; all output."""
    serve = ["--serve", str(layers), str(units)]
    return launched(ranks, serve + (["--limit", str(limit)] if limit is not None else []))


def launched(
    ranks: int, serve: list[str], environment: dict[str, str] | None = None
) -> tuple[int, list[tuple[int, int, str]], str]:
    """As `run`, for the options of this program in each rank."""
    code, found, output = finished([*run_command(ranks), *serve], environment)
    return code, [numbers for _, numbers in found], output


def run_command(ranks: int) -> list[str]:
    """Starts this program in several ranks."""
    command = [sys.executable, "-m", "opensmp", "run", "-n", str(ranks)]
    return [*command, "--partitions", str(ranks), "--all-output", __file__]


def finished(
    command: list[str], environment: dict[str, str] | None = None
) -> tuple[int, list[tuple[int, tuple[int, int, str]]], str]:
    """Exit code of a command, the numbers that each rank printed, and all output."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    output = done.stdout + done.stderr
    found = sorted(re.findall(r"RESULT (\d+) (\d+) (\d+) (\S+)", output), key=lambda r: int(r[0]))
    rows = [(int(rank), (int(first), int(second), rest)) for rank, first, second, rest in found]
    return done.returncode, rows, output


def served(what: str, command: list[str]) -> list[tuple[int, tuple[int, int, str]]]:
    """The numbers of each rank of a command that must end well."""
    code, found, output = finished(command)
    if code or not found:
        raise SystemExit(f"{what} ended with {code}:\n{output[-3000:]}")
    return found


def checked(ranks: int, layers: int, units: int) -> list[tuple[int, int, str]]:
    code, found, output = run(ranks, layers, units)
    if code or len(found) != ranks:
        raise SystemExit(f"{ranks} ranks ended with {code}:\n{output[-3000:]}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--units", type=int, default=2048)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--serve", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--growth", action="store_true", help="against microbatches")
    parser.add_argument("--serve-growth", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--recompute", action="store_true", help="with recomputation")
    parser.add_argument("--serve-recompute", help=argparse.SUPPRESS)
    parser.add_argument("--transformer", action="store_true", help="beside one plain process")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--offload", action="store_true", help="with residuals in files")
    parser.add_argument("--serve-offload", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--serve-plain", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--serve-torch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--serve-split", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve_recompute:
        serve_recompute(arguments.serve_recompute, arguments.limit)
        return 0
    if arguments.serve_offload:
        serve_offload(*arguments.serve_offload, arguments.limit)
        return 0
    if arguments.offload:
        return show_offload("quick" if arguments.quick else "full")
    if arguments.recompute:
        return show_recompute()
    if arguments.serve_plain:
        serve_plain(arguments.serve_plain[0], int(arguments.serve_plain[1]))
        return 0
    if arguments.serve_torch:
        serve_torch(arguments.serve_torch)
        return 0
    if arguments.serve_split:
        size, count, pipeline = arguments.serve_split
        serve_split(size, int(count), pipeline)
        return 0
    if arguments.quick:
        show_transformer("quick", (4,))
        return 0
    if arguments.transformer:
        missed = show_transformer()
        print("\n".join(missed))
        return 1 if missed else 0
    if arguments.serve_growth:
        serve_growth(arguments.serve_growth[0], int(arguments.serve_growth[1]))
        return 0
    if arguments.growth:
        show_growth()
        return 0
    if arguments.serve:
        serve(*arguments.serve, arguments.limit)
        return 0
    layers, units = arguments.layers, arguments.units
    mebi = 1 << 20
    weights = layers * (units * units + units) * 4
    print(
        f"MLP, {layers} x {units}: {weights / mebi:.0f} MiB of weights, "
        f"{4 * weights / mebi:.0f} MiB with gradients and the slots of Adam\n"
    )
    bases = {n: max(h for h, _, _ in checked(n, 2 * n, 4)) for n in (1, *arguments.ranks)}
    ((one, _, loss),) = checked(1, layers, units)
    print("| processes | base | largest peak | model's share | of the one process | at most |")
    print("| --- | --- | --- | --- | --- | --- |")
    share = one - bases[1]
    print(f"| 1 | {bases[1] / mebi:.0f} MiB | {one / mebi:.0f} MiB | {share / mebi:.0f} MiB | | |")
    failed = []
    for n in arguments.ranks:
        found = checked(n, layers, units)
        assert all(abs(float(other) / float(loss) - 1) < 1e-4 for _, _, other in found), found
        peak = max(h for h, _, _ in found)
        ratio = (peak - bases[n]) / share
        limit = 1 / n + ALLOWED
        print(
            f"| {n} | {bases[n] / mebi:.0f} MiB | {peak / mebi:.0f} MiB | "
            f"{(peak - bases[n]) / mebi:.0f} MiB | {100 * ratio:.0f} % | {100 * limit:.0f} % |",
            flush=True,
        )
        if ratio > limit:
            failed.append(f"{n} processes need {100 * ratio:.0f} % each")
    # Four times the weights, beside which what TensorFlow reserves and does not use is little.
    large = 2 * units
    ((_, data, _),) = checked(1, layers, large)
    needed = max(d for _, d, _ in checked(n, layers, large))
    cap = needed + needed // 4
    alone, _, _ = run(1, layers, large, cap)
    together, _, output = run(n, layers, large, cap)
    print(
        f"\n{layers} x {large} under a limit of {cap / mebi:.0f} MiB of data a process: "
        f"one process ({data / mebi:.0f} MiB without it) {'trains' if alone == 0 else 'fails'}, "
        f"{n} ranks ({needed / mebi:.0f} MiB) {'train' if together == 0 else 'fail'}."
    )
    if alone == 0 or together != 0:
        failed.append(f"the limit: one process {alone}, {n} ranks {together}\n{output[-2000:]}")
    print("\n".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
