"""What each part of the partitioner is worth: plans without it, against plans with all parts.

`python benchmarks/partition_quality.py --ablate` runs it. A part is taken away by patching; the
results of each part and model are kept in `out/ablation.json`, so that a run that was stopped
continues where it was. Delete the file after a change of the partitioner.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from opensmp.compiler.plan.coarsening import contraction
from opensmp.compiler.plan.cost_model import evaluate
from opensmp.compiler.plan.partitioner import (
    baselines,
    connectivity,
    dynamic_programming,
    ideals,
    interval_cuts,
    local_search,
    partitioner,
    topological_orders,
)
from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.plan.unit_graph import CoarseGraph

SETTINGS = PlanSettings(microbatches=8)
PARTITIONS = (2, 4, 8, 32)
RULES = tuple((o, c) for o in ("speed", "memory") for c in (True, False))

FILE = Path(__file__).parents[1] / "out" / "ablation.json"

Assignment = Any
Graphs = Mapping[str, Mapping[str, CoarseGraph]]
Row = tuple[float, int, float]
Results = dict[str, dict[str, dict[str, Row]]]


class Part(NamedTuple):
    """A part of the partitioner.

    Attributes:
        name: What is taken away.
        patches: Returns the patches that take it away.
        code: What could be deleted: functions, classes, modules.
        more_lines: Lines of it within other functions.
        expected: The largest loss of step time that was expected before measuring, in percent.
        graphs: Which graphs to cut: "default", or the name of a coarsening without a part.
    """

    name: str
    patches: Callable[[], Iterable[Any]]
    code: tuple[Any, ...]
    more_lines: int
    expected: float
    graphs: str = "default"

    @property
    def lines(self) -> int:
        return self.more_lines + sum(len(inspect.getsourcelines(c)[0]) for c in self.code)


def _set(target: Any, **values: Any) -> list[Any]:
    return [mock.patch.object(target, name, value) for name, value in values.items()]


def _without_orders(*dropped: int) -> list[Any]:
    every = partitioner.topological_orders

    def orders(problem: Any, most: int = 6) -> list[Any]:
        known = every(problem, 1)
        for index in range(2, most + 1):
            if index - 1 not in dropped:
                # The order at an index is what it adds to those before it.
                known += every(problem, index)[len(every(problem, index - 1)) :]
        return known

    return _set(partitioner, topological_orders=orders)


def _no_complete_lattice(*_: Any) -> list[int]:
    raise ideals.LatticeError("not tried")


def _no_ideals_near(problem: Any, *_: Any) -> list[int]:
    return [0, (1 << len(problem)) - 1]


def _same(_: Any, placed: Assignment, *__: Any) -> Assignment:
    return placed


def _no_recut() -> list[Any]:
    cut = partitioner._cut

    def first_cut(*args: Any, near: Any = None, **rest: Any) -> list[Assignment]:
        return cut(*args, **rest) if near is None else []

    return _set(partitioner, _cut=first_cut)


def _connected_from_the_start() -> list[Any]:
    search = partitioner._search

    def searched(problem: Any, contiguous: bool, starts: Sequence[Assignment]) -> list[Assignment]:
        if not contiguous:
            return search(problem, contiguous, starts)
        orders = partitioner.topological_orders(problem)
        found = partitioner._Found(problem)
        found.add(*(partitioner.join_pieces(problem, placed) for placed in starts))
        for order in orders:
            found.add(*partitioner._cut(problem, order, found.best, contiguous=True))
        return partitioner._improve(problem, found, orders, connectivity.Neighbourhood(problem))

    return _set(partitioner, _search=searched)


def _one_memory_pass() -> list[Any]:
    solve = partitioner._solve

    def solved(problem: Any, optimize: str, contiguous: bool) -> Assignment:
        if optimize == "speed":
            return solve(problem, optimize, contiguous)
        problem = partitioner.replace(problem, minimise_bytes=True)
        return partitioner._search(problem, contiguous, partitioner.simple_runs(problem))[0]

    return _set(partitioner, _solve=solved)


def _no_slack() -> list[Any]:
    most_ticks = dynamic_programming.most_ticks

    def exact(problem: Any, best: Any) -> float:
        return most_ticks(problem, best, slack=False)

    return [
        patch
        for module in (dynamic_programming, ideals, interval_cuts)
        for patch in _set(module, most_ticks=exact)
    ]


def _sampled_evenly(_: Any, __: Any, inner: Any, ___: Any) -> Any:
    return inner[np.linspace(0, len(inner) - 1, interval_cuts._MOST_POSITIONS).astype(np.int64)]


def _score_alone(layout: Any) -> tuple[int, ...]:
    return tuple(layout._problem.score_of(layout._ticks, layout._held))


PARTS = (
    Part(
        "baselines as starting points",
        lambda: _set(partitioner, simple_runs=lambda problem: []),
        (baselines,),
        0,
        0.0,
    ),
    Part(
        "all orders but the graph's own",
        lambda: _without_orders(*range(1, 6)),
        (
            topological_orders._post_order,
            topological_orders._by_depth,
            topological_orders._least_alive,
        ),
        15,
        3.0,
    ),
    Part("depth-first orders", lambda: _without_orders(1, 2), (), 2, 0.3),
    Part(
        "order that keeps few bytes alive",
        lambda: _without_orders(3),
        (topological_orders._least_alive,),
        1,
        0.2,
    ),
    Part(
        "orders by depth",
        lambda: _without_orders(4, 5),
        (topological_orders._by_depth,),
        2,
        0.3,
    ),
    Part(
        "connected cuts of an order (else: cut, then joined)",
        lambda: _set(partitioner, _MOST_UNITS_TO_CUT_CONNECTED=0),
        (
            connectivity.interval_excess,
            connectivity._order_edges,
            connectivity._parts_touched,
            connectivity._Forest,
        ),
        4,
        2.0,
    ),
    Part(
        "joining the best 8 disconnected plans (else: the best)",
        lambda: _set(partitioner, _NUM_LOOSE=1),
        (),
        1,
        0.3,
    ),
    Part("cuts without the connectivity rule first", _connected_from_the_start, (), 5, 0.5),
    Part(
        "all ideals of a small graph",
        lambda: _set(partitioner, all_ideals=_no_complete_lattice),
        (ideals.all_ideals, ideals.LatticeError),
        5,
        0.5,
    ),
    Part(
        "ideals near the best plans",
        lambda: _set(partitioner, ideals_near=_no_ideals_near),
        (ideals.ideals_near,),
        3,
        0.5,
    ),
    Part(
        "ideals of any kind",
        lambda: [
            *_set(partitioner, all_ideals=_no_complete_lattice, ideals_near=_no_ideals_near),
        ],
        (ideals,),
        9,
        1.5,
    ),
    Part("local search", lambda: _set(partitioner, refine=_same), (local_search,), 3, 1.0),
    Part(
        "local search: moves that worsen the cost",
        lambda: _set(local_search, _PATIENCE=1),
        (),
        10,
        0.4,
    ),
    Part(
        "local search: unevenness ranks equal scores",
        lambda: _set(local_search._Layout, key=_score_alone),
        (),
        2,
        0.2,
    ),
    Part(
        "local search of more than the best plan",
        lambda: _set(partitioner, _NUM_ELITES=1, _NUM_ELITES_OF_MANY=1),
        (),
        3,
        0.3,
    ),
    Part(
        "cuts along orders that follow the best plan",
        _no_recut,
        (topological_orders.follow,),
        6,
        0.3,
    ),
    Part(
        "rounds after the first",
        lambda: _set(partitioner, _MOST_ROUNDS=1, _MOST_ROUNDS_OF_MANY=1),
        (),
        4,
        0.2,
    ),
    Part(
        "rounds",
        lambda: _set(partitioner, _MOST_ROUNDS=0, _MOST_ROUNDS_OF_MANY=0),
        (ideals.ideals_near, topological_orders.follow),
        12,
        1.0,
    ),
    Part("the fastest of those with the least memory", _one_memory_pass, (), 6, 20.0),
    Part("slack of the bound on the slowest stage", _no_slack, (), 2, 0.3),
    Part(
        "lower and lower bounds on the slowest stage",
        lambda: _set(dynamic_programming, _MOST_LIMITS=1),
        (),
        8,
        5.0,
    ),
    Part(
        "choice of positions (else: evenly spaced)",
        lambda: _set(interval_cuts, _choose=_sampled_evenly),
        (interval_cuts._choose, interval_cuts._crossing),
        0,
        0.3,
    ),
    Part("coarsening: division of large layers", list, (), 25, 30.0, "undivided"),
    Part(
        "coarsening: light chains joined",
        list,
        (contraction.chained,),
        24,
        0.0,
        "unchained",
    ),
    Part("coarsening: readers of one variable joined", list, (), 5, 0.5, "unshared"),
    Part(
        "coarsening: chains before runs, to 32 units",
        list,
        (),
        14,
        10.0,
        "runs",
    ),
)


def coarsening(units: Any, name: str) -> list[Any]:
    """Returns the patches of a coarsening without a part; `units` is its module."""
    none: Callable[..., Any] = lambda needs, *_, **__: list(range(len(needs)))  # noqa: E731
    if name == "undivided":
        return _set(units.Units, _large_layers=lambda self: set())
    if name == "unchained":
        return _set(units, chained=none)
    if name == "unshared":
        pairs = units.Units._pairs

        def others(self: Any, of: Mapping[int, int]) -> list[Any]:
            with mock.patch.object(self, "variables", {}):
                return pairs(self, of)

        return _set(units.Units, _pairs=others)
    if name == "runs":
        return _set(contraction, chained=none)
    return []


@contextlib.contextmanager
def patched(patches: Iterable[Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def measure(part: str, graph: CoarseGraph) -> dict[str, Row]:
    """Returns step seconds, bytes of the fullest device and processor seconds of each case."""
    patches = next((p.patches for p in PARTS if p.name == part), list)
    rows = {}
    for count in PARTITIONS:
        for optimize, contiguous in RULES:
            settings = replace(SETTINGS, optimize=optimize, contiguous=contiguous)
            with patched(patches()):
                started = time.process_time()
                placed = partitioner.partition_units(graph, count, settings)
                seconds = time.process_time() - started
            plan = evaluate(graph, placed, count, settings)
            key = f"{count} {optimize}{' contiguous' if contiguous else ''}"
            rows[key] = (plan.step_seconds, max(plan.peak_bytes), seconds)
    return rows


def run(graphs: Graphs, options: Any) -> Results:
    """Measures what the file of results lacks until the time is over; returns all results.

    Args:
        graphs: For each coarsening, the graph of each model.
        options: `ablate`, words of the names of the parts, all if empty; `jobs`, the number of
            processes; `seconds`, after which no case is started.
    """
    results: Results = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    deadline = time.monotonic() + options.seconds
    words = options.ablate or [""]
    parts = [part for part in PARTS if any(word in part.name for word in words)]
    tasks = [
        (part, model, graph)
        for part, kind in [("", "default"), *((part.name, part.graphs) for part in parts)]
        for model, graph in graphs[kind].items()
        if model not in results.get(part, {})
    ]
    tasks.reverse()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        running: dict[Any, tuple[str, str]] = {}
        while True:
            while tasks and len(running) < options.jobs and time.monotonic() < deadline:
                part, model, graph = tasks.pop()
                running[pool.submit(measure, part, graph)] = part, model
            if not running:
                break
            done = next(as_completed(running))
            part, model = running.pop(done)
            results.setdefault(part, {})[model] = done.result()
            FILE.parent.mkdir(exist_ok=True)
            FILE.write_text(json.dumps(results), encoding="utf-8")
    if tasks:
        print(f"{len(tasks)} graphs are left; run it again to continue.")
    return results


def table(results: Results) -> str:
    """Returns a Markdown table of what the plans lose without each part."""
    lines = [
        "| taken away | lines | cases | worse | mean loss | worst loss | expected | in memory: "
        "worse | worst growth | processor time saved |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    base = results[""]
    for part in PARTS:
        models = [model for model in results.get(part.name, {}) if model in base]
        pairs = [
            (key, results[part.name][model][key], base[model][key], model)
            for model in models
            for key in base[model]
        ]
        if not pairs:
            continue
        loss = [100 * (new[0] / old[0] - 1) for _, new, old, _ in pairs]
        growth = [100 * (new[1] / old[1] - 1) for key, new, old, _ in pairs if "memory" in key]
        saved = 1 - sum(new[2] for _, new, _, _ in pairs) / sum(old[2] for _, _, old, _ in pairs)
        lines.append(
            f"| {part.name} | {part.lines} | {len(pairs)} | {sum(x > 0.001 for x in loss)} "
            f"| {np.mean(loss):.2f} % | {max(loss):.2f} % | {part.expected} % "
            f"| {sum(x > 0.001 for x in growth)} | {max(growth):.2f} % | {100 * saved:.0f} % |"
        )
    return "\n".join(lines)
