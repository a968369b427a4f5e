"""What schedules cost to make, and whether their bubble and memory are what the formulas say.

    python benchmarks/schedules.py            # P = 8 to 1,024, some minutes
    python benchmarks/schedules.py --quick    # up to P = 128, under a minute

The first table is for pipelines of equal stages as arrays (`opensmp.compiler.schedule.regular`):
processor time to make a schedule, and to validate and simulate it, per action, and the memory that
this takes at most, per action. Each row is a process of its own, so that its peak is its own.

The second table is the same for task graphs of objects, which is what a step uses: the graph, the
schedule, its validation and its simulation. `zero_bubble` tries all its candidates up to 4,000
actions, which takes half a second at most, and a few of them above.

At P = 8 the bytes of an action are a share of about a megabyte that any size takes.

The third table compares the length of a step, in passes of equal time, and the microbatches that
the fullest device holds, with the formulas of the papers as the docstrings give them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from opensmp.compiler.schedule.actions import TaskGraph
from opensmp.compiler.schedule.pipelines import BUILDERS
from opensmp.compiler.schedule.regular.list_scheduling import list_regular
from opensmp.compiler.schedule.regular.pipeline import RegularPipeline, RegularSchedule
from opensmp.compiler.schedule.regular.simulation import RegularSimulation, simulate_regular
from opensmp.compiler.schedule.simulate import simulate
from opensmp.compiler.schedule.validate import validate
from opensmp.config.pipelines import PIPELINES


class Formula(NamedTuple):
    """Length of a step in passes, and microbatches held, for P devices and M microbatches."""

    passes: Callable[[int, int], float]
    held: Callable[[int, int], float]


FORMULAS = {
    "simple": Formula(lambda p, m: 3 * m + 2 * (p - 1), lambda p, m: m),
    "interleaved": Formula(lambda p, m: 3 * m + 2 * (p - 1), lambda p, m: p),
    "zero_bubble": Formula(lambda p, m: 3 * m + p - 1, lambda p, m: 2 * p - 1),
    "zb_h2": Formula(lambda p, m: 3 * m + p - 1, lambda p, m: 2 * p - 1),
    "breadth_first": Formula(lambda p, m: 6 * m + 2 * (p - 1), lambda p, m: m),
    "zb_v": Formula(lambda p, m: 6 * m + 2 * p - 3, lambda p, m: p),
    "v_half": Formula(
        lambda p, m: 6 * m + (7 * p - (9 if p % 2 else 6)) // 2, lambda p, m: p // 2 + 1
    ),
    "v_min": Formula(lambda p, m: 6 * m + 4 * p - 5 + (p % 3 == 0), lambda p, m: (p + 4) // 3),
    "dualpipe_v": Formula(lambda p, m: 6 * m + p - 1, lambda p, m: p + 0.5),
}

SIZES = ((8, 32), (32, 128), (128, 512), (512, 2048), (1024, 4096))
OBJECT_SIZES = ((8, 32), (32, 128), (128, 256))


def in_flight(name: str, devices: int) -> int:
    """As many as fill the bubble; `zero_bubble` needs nearly two for each device."""
    return 2 * devices if name == "zero_bubble" else devices


def made(name: str, devices: int, microbatches: int) -> RegularSchedule:
    pieces = 2 if name == "breadth_first" else PIPELINES[name].pieces or 1
    pipeline = RegularPipeline(devices, microbatches, pieces, PIPELINES[name].placement)
    if name in ("simple", "interleaved", "zero_bubble"):
        return list_regular(name, pipeline, in_flight(name, devices))
    module = importlib.import_module(f"opensmp.compiler.schedule.methods.{name}")
    return pipeline.schedule(name, module.passes)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_arrays(name: str, devices: int, microbatches: int) -> dict[str, float]:
    simulate_regular(made(name, 2, 2))  # imports
    before = peak_bytes()
    start = time.process_time()
    schedule = made(name, devices, microbatches)
    middle = time.process_time()
    result = simulate_regular(schedule)
    end = time.process_time()
    return {
        "actions": schedule.pipeline.num_actions,
        "make": middle - start,
        "simulate": end - middle,
        "bytes": peak_bytes() - before,
        "rss": peak_bytes(),
        **results(result, schedule),
    }


def results(result: RegularSimulation, schedule: RegularSchedule) -> dict[str, float]:
    return {
        "passes": result.makespan_seconds,
        "bubble": result.bubble,
        "held": max(result.live_activations) / schedule.pipeline.pieces,
    }


def measure_objects(name: str, devices: int, microbatches: int) -> dict[str, float]:
    pieces = 2 if name == "breadth_first" else PIPELINES[name].pieces or 1
    homes = RegularPipeline(devices, 1, pieces, PIPELINES[name].placement).device_of_segment
    small = TaskGraph.chain(2, 2)
    simulate(BUILDERS[name](small, 2), small)  # imports
    start = time.process_time()
    graph = TaskGraph.chain(
        devices * pieces, microbatches, split_backward=True, devices=homes.tolist()
    )
    graphed, before = time.process_time(), peak_bytes()
    own = PIPELINES[name].held is not None
    schedule = BUILDERS[name](graph, microbatches if own else in_flight(name, devices))
    finished = time.process_time()
    validate(schedule, graph)
    simulate(schedule, graph)
    return {
        "actions": len(graph.device),
        "graph": graphed - start,
        "make": finished - graphed,
        "simulate": time.process_time() - finished,
        "bytes": peak_bytes() - before,
    }


def in_a_process(*what: object) -> Any:
    """Measures in a process of its own."""
    command = [sys.executable, __file__, "--row", *map(str, what)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def show(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="up to P = 128")
    parser.add_argument("--row", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        kind, name, devices, microbatches = options.row
        measure = {"arrays": measure_arrays, "objects": measure_objects}[kind]
        print(json.dumps(measure(name, int(devices), int(microbatches)), default=float))
        return
    sizes = [size for size in SIZES if not options.quick or size[0] <= 128]
    arrays = {
        (name, *size): in_a_process("arrays", name, *size) for name in FORMULAS for size in sizes
    }
    show(
        "Arrays: microseconds and bytes an action",
        ("schedule", "P", "M", "actions", "make", "validate, simulate", "bytes", "s", "GB"),
        [
            (
                f"`{name}`",
                p,
                m,
                f"{row['actions']:,}",
                f"{1e6 * row['make'] / row['actions']:.1f}",
                f"{1e6 * row['simulate'] / row['actions']:.1f}",
                f"{row['bytes'] / row['actions']:.0f}",
                f"{row['make'] + row['simulate']:.1f}",
                f"{row['rss'] / 1e9:.2f}",
            )
            for (name, p, m), row in arrays.items()
        ],
    )
    objects = {
        (name, *size): in_a_process("objects", name, *size)
        for name in (*FORMULAS, "auto")
        for size in OBJECT_SIZES[: 2 if options.quick or name == "auto" else None]
    }
    show(
        "Objects: microseconds and bytes an action",
        ("schedule", "P", "M", "actions", "graph", "make", "validate, simulate", "bytes"),
        [
            (
                f"`{name}`",
                p,
                m,
                f"{row['actions']:,}",
                *(f"{1e6 * row[k] / row['actions']:.1f}" for k in ("graph", "make", "simulate")),
                f"{row['bytes'] / row['actions']:.0f}",
            )
            for (name, p, m), row in objects.items()
        ],
    )
    show(
        "Simulated and by the formula",
        ("schedule", "P", "M", "passes", "formula", "bubble", "held", "formula"),
        [
            (
                f"`{name}`",
                p,
                m,
                f"{row['passes']:.0f}",
                f"{FORMULAS[name].passes(p, m):.0f}",
                f"{100 * row['bubble']:.1f} %",
                f"{row['held']:g}",
                f"{FORMULAS[name].held(p, m):g}",
            )
            for (name, p, m), row in arrays.items()
        ],
    )


if __name__ == "__main__":
    main()
