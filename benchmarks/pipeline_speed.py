"""Two processes, one core each: the speed of a pipelined step, beside torch.distributed.pipelining.

    python benchmarks/pipeline_speed.py
    python benchmarks/pipeline_speed.py --torch-python /path/to/python   # with torch beside
    python benchmarks/pipeline_speed.py --only 1f1b "torch 1f1b" --torch-python /path/to/python

The same training step (forward and backward passes of M microbatches, SGD) as

- one process with one thread: plain Keras, microbatch after microbatch;
- two such processes side by side, a core each, which have nothing to do with each other: what
  they lose by sharing a machine, no schedule can win back;
- one process with one thread: ours, with one partition. It has nothing to overlap, and is quicker
  only where gradients of weights for several microbatches come from one product;
- two ranks of `opensmp run -n 2 --bind-cores`, a core each, for each of our schedules: `simple`,
  `interleaved`, `zero_bubble`, `auto`, and the last three with the model in four pieces that the
  ranks take in turns, and `zb_v`, where the first rank has the first and the last of four pieces;
  the model is cut by cost;
- the same in torch, with gloo: one thread, and two ranks with each of its schedules, which are
  named GPipe, 1F1B, interleaved 1F1B, (interleaved) zero bubble and ZBV there; the model is cut at
  equal numbers of layers, into four pieces for the last three.

All of a row run in turns, a few steps at a time, while the others wait. A speed-up is the
median over the rounds of the one-thread step of the same library over the pipelined step; as a
share it is half of that. With whole backward passes, as torch has them, the bubble leaves
M / (M + P - 1) of P = 2 at best; where the gradients of inputs leave first, as ours do, and each
half of a backward pass takes as long as a forward pass, 1.5 M / (1.5 M + P - 1). Both count the
work of the plain step; where ours has less to do, it can be above.

Prediction, written before the first measurement: on the Transformer 95 % of the bubble bound at
every M; on the MLP, whose microbatches are small for their 4 MB of weights a layer, 85 %. Before
gradients of inputs left first: 5 hundredths more for `simple` and `1f1b` with M = 4, 3 for
`interleaved`. Before gradients of several microbatches came from one product: on the MLP 20
hundredths more with M = 16, 8 with M = 8, 3 with M = 4; nothing on the Transformer, whose
microbatches have as many rows as its weights. Before no Python ran for a tensor that is there when
it is needed: 2 to 3 hundredths on the Transformer, more on the MLP. Before only as many
gradients of weights waited as fill the last bubble: `zero bubble` on the Transformer 5 hundredths
more with M = 16, 1 with M = 8 (found: none).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import socket
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

from served import STEPS_PER_TURN, WARM_UP, Measured, answer_steps, in_turns, spread

WORKLOADS = ("mlp", "transformer", "quick")
# Name: the pipeline, and in how many pieces a rank has its half of the model.
OURS = {
    "simple": ("simple", 1),
    "1f1b": ("interleaved", 1),
    "interleaved": ("interleaved", 2),
    "zero bubble": ("zero_bubble", 1),
    "zero bubble, 2 pieces": ("zero_bubble", 2),
    "zero bubble V": ("zb_v", 2),
    "auto": ("auto", 1),
    "auto, 2 pieces": ("auto", 2),
}
ALONE, SIDE_BY_SIDE, OURS_ALONE = "one thread", "side by side", "ours, one thread"
TORCH = ("gpipe", "1f1b", "interleaved", "zero bubble", "zero bubble V")
PROGRAMS = (SIDE_BY_SIDE, OURS_ALONE, *OURS, *(f"torch {schedule}" for schedule in TORCH))
RANKS = 2


def bound(microbatches: float) -> float:
    """The share of a perfect speed-up that the bubble leaves."""
    return microbatches / (microbatches + RANKS - 1)


# ------------------------------------------------------------- the processes that are measured


def serve(workload: str, microbatches: int, role: str, fifos: Sequence[str], answers: str) -> None:
    """Runs what the lines of this rank's FIFO ask for; rank 0 answers."""
    import tensorflow as tf

    import opensmp as smp
    import overlap

    made = overlap.WORKLOADS[workload]()
    rank = int(os.environ.get("BESIDE", "0"))
    if role == SIDE_BY_SIDE:
        os.sched_setaffinity(0, {rank})
    if role in (ALONE, SIDE_BY_SIDE):
        train_step = overlap.plain_step(made, microbatches)
    elif role == OURS_ALONE:
        train_step = overlap.pipelined_step(made, microbatches, partitions=1)
    else:
        pipeline, pieces = OURS[role]
        train_step = overlap.pipelined_step(made, microbatches, pipeline, pieces)
        rank = smp.rank()
    data = tf.constant(made.inputs), tf.constant(made.labels)
    answer_steps(train_step, data, rank, fifos, answers)


# ----------------------------------------------------------------------- the one that measures


@contextlib.contextmanager
def measured(
    workload: str, microbatches: int, torch_python: str | None, names: Sequence[str]
) -> Iterator[dict[str, Measured]]:
    """The programs of a row, started."""
    common = ["--workload", workload, "--microbatches", str(microbatches)]
    single = {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}
    one_core = ["taskset", "-c", "0"] if hasattr(os, "sched_setaffinity") else []
    running: dict[str, Measured] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            plain = [*one_core, sys.executable, __file__, "--serve", ALONE, *common]
            running[ALONE] = Measured(folder, "one", plain, 1, environments=[single])
            if SIDE_BY_SIDE in names:
                both = [sys.executable, __file__, "--serve", SIDE_BY_SIDE, *common]
                cores = [{**single, "BESIDE": str(core)} for core in range(RANKS)]
                running[SIDE_BY_SIDE] = Measured(folder, "both", both, RANKS, environments=cores)
            if OURS_ALONE in names:
                own = [*one_core, sys.executable, __file__, "--serve", OURS_ALONE, *common]
                running[OURS_ALONE] = Measured(folder, "ours one", own, 1, environments=[single])
            for schedule in [schedule for schedule in OURS if schedule in names]:
                launcher = [sys.executable, "-m", "opensmp", "run", "-n", str(RANKS)]
                launcher += ["--bind-cores", __file__, "--serve", schedule, *common]
                running[schedule] = Measured(folder, f"ours {schedule}", launcher, RANKS)
            schedules = [schedule for schedule in TORCH if f"torch {schedule}" in names]
            if torch_python is not None and schedules:
                add_torch(running, folder, torch_python, common, one_core, schedules)
            yield running
        finally:
            for process in running.values():
                process.end()


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def add_torch(
    running: dict[str, Measured],
    folder: Path,
    python: str,
    common: list[str],
    one_core: list[str],
    schedules: Sequence[str],
) -> None:
    script = str(Path(__file__).with_name("peer_torch.py"))
    command = [*one_core, python, script, "--schedule", ALONE, *common]
    running[f"torch {ALONE}"] = Measured(folder, "torch one", command, 1)
    for schedule in schedules:
        port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environments = [
            {**port, "RANK": str(rank), "WORLD_SIZE": str(RANKS), "OMP_NUM_THREADS": "1"}
            for rank in range(RANKS)
        ]
        running[f"torch {schedule}"] = Measured(
            folder,
            f"torch {schedule}",
            [python, script, "--schedule", schedule, *common],
            RANKS,
            environments=environments,
        )


def row(
    workload: str,
    microbatches: int,
    rounds: int,
    torch_python: str | None,
    names: Sequence[str],
    steps: int,
) -> None:
    """Measures one row of the table."""
    with measured(workload, microbatches, torch_python, names) as running:
        first = {name: process.steps(WARM_UP) for name, process in running.items()}
        ours = [answer["loss"] for name, answer in first.items() if not name.startswith("torch")]
        np.testing.assert_allclose(ours[1:], ours[0], rtol=1e-4)
        times = in_turns(running, rounds, steps)
    cells = [str(microbatches), f"{1e3 * statistics.median(times[ALONE]):.0f} ms"]
    for name in running:
        if name in (ALONE, f"torch {ALONE}"):
            continue
        base = times[f"torch {ALONE}" if name.startswith("torch") else ALONE]
        perfect = 1 if name in (SIDE_BY_SIDE, OURS_ALONE) else RANKS
        share = spread([b / t / perfect for b, t in zip(base, times[name], strict=True)])
        cells.append(f"{share}, {1e3 * statistics.median(times[name]):.0f} ms")
    cells += [f"{bound(microbatches):.2f}", f"{bound(1.5 * microbatches):.2f}"]
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> int:
    only = f"measure these beside '{ALONE}': {', '.join(map(repr, PROGRAMS))}"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, help="which models")
    parser.add_argument("--microbatches", nargs="+", type=int, help="which M")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each program")
    parser.add_argument("--steps", type=int, default=STEPS_PER_TURN, help="steps of a turn")
    parser.add_argument("--torch-python", help="a Python that has torch 2.13, to measure it too")
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, metavar="NAME", help=only)
    parser.add_argument("--quick", action="store_true", help="a small model, few steps")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--workload", help=argparse.SUPPRESS)
    parser.add_argument("--fifos", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--answers", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(
            arguments.workload,
            arguments.microbatches[0],
            arguments.serve,
            arguments.fifos,
            arguments.answers,
        )
        return 0
    names = arguments.workloads or (["quick"] if arguments.quick else ["mlp", "transformer"])
    counts = arguments.microbatches or ([4] if arguments.quick else [2, 4, 8, 16])
    rounds = 2 if arguments.quick else arguments.rounds
    torch_python = arguments.torch_python
    programs = [
        program
        for program in arguments.only or PROGRAMS
        if (torch_python or not program.startswith("torch"))
        and (hasattr(os, "sched_setaffinity") or program != SIDE_BY_SIDE)
    ]
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, {rounds} rounds")
    for name in names:
        print(f"\n{name}: share of a perfect two-way speed-up, and the time of a step\n")
        columns = ["M", ALONE]
        columns += [
            f"ours, {name}" if name in OURS else name for name in PROGRAMS if name in programs
        ]
        columns += ["bubble bound", "in halves"]
        print(f"| {' | '.join(columns)} |")
        print(f"|{' --- |' * len(columns)}", flush=True)
        for count in counts:
            row(name, count, rounds, torch_python, programs, arguments.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
