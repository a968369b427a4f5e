from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from compiler.plan.exact import optimal_units
from compiler.plan.unit_graphs import (
    MACHINES,
    all_plans,
    chain,
    made_for,
    problem_of,
    random_chain,
    random_dag,
    unit_graph,
    unit_graphs,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from turns import in_turn

from opensmp.compiler.plan.cost_model import Prediction, evaluate
from opensmp.compiler.plan.partitioner.baselines import simple_runs
from opensmp.compiler.plan.partitioner.connectivity import excess_pieces
from opensmp.compiler.plan.partitioner.partitioner import MEMORY_TOLERANCE, partition_units
from opensmp.compiler.plan.unit_graph import CoarseGraph, Machine, SharedVariable
from opensmp.errors import PlanError

ROOT = Path(__file__).parents[4]
MACHINE = Machine(transfer_seconds=0.01, transfer_bytes_per_second=1e5)
OPTIMIZE = ("memory", "speed")


def baselines() -> ModuleType:
    spec = importlib.util.spec_from_file_location("baselines", ROOT / "benchmarks/baselines.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plan(graph: CoarseGraph, num_partitions: int, **rules: object) -> list[int]:
    return partition_units(graph, num_partitions, made_for(MACHINE, 4, **rules)).tolist()  # type: ignore[arg-type]


def predict(graph: CoarseGraph, placed: object, num_partitions: int) -> Prediction:
    return evaluate(graph, placed, num_partitions, made_for(MACHINE, 4))  # type: ignore[arg-type]


@given(unit_graphs(), MACHINES, st.integers(1, 5), st.sampled_from(OPTIMIZE), st.booleans())
@settings(max_examples=100, deadline=None)
def test_every_plan_is_one_that_a_pipeline_can_run(
    graph: CoarseGraph, machine: Machine, num_partitions: int, optimize: str, contiguous: bool
) -> None:
    placed = partition_units(
        graph, num_partitions, made_for(machine, 4, optimize=optimize, contiguous=contiguous)
    )
    assert placed.dtype == np.int64
    prediction = evaluate(
        graph, placed, num_partitions, made_for(machine, 4)
    )  # refuses tensors going back
    used = min(num_partitions, len(graph))
    assert prediction.empty_partitions == tuple(range(used, num_partitions))
    if contiguous:
        assert excess_pieces(problem_of(graph, num_partitions, machine), placed) == 0


@given(unit_graphs(max_size=7), st.integers(2, 3), st.booleans())
@settings(max_examples=60, deadline=None)
def test_tiny_graphs_are_planned_about_as_well_as_possible(
    graph: CoarseGraph, num_partitions: int, contiguous: bool
) -> None:
    problem = problem_of(graph, num_partitions)
    least = min(
        predict(graph, placed, num_partitions).step_seconds
        for placed in all_plans(graph, num_partitions)
        if not contiguous or not excess_pieces(problem, placed)
    )
    placed = plan(graph, num_partitions, optimize="speed", contiguous=contiguous)
    # A tensor that goes to several partitions can make the last bit of difference.
    assert predict(graph, placed, num_partitions).step_seconds <= 1.1 * least + 1e-9


@pytest.mark.parametrize("num_partitions", [2, 4])
@pytest.mark.parametrize("contiguous", [True, False])
def test_plans_of_graphs_like_models_are_within_2_percent_of_the_optimum(
    num_partitions: int, contiguous: bool
) -> None:
    gaps = []
    for seed in range(10):
        graph = random_dag(18, seed, reach=3)
        rules = {"optimize": "speed", "contiguous": contiguous}
        ours = predict(graph, plan(graph, num_partitions, **rules), num_partitions)
        best = predict(
            graph,
            optimal_units(
                graph, num_partitions, made_for(MACHINE, 4, optimize="speed", contiguous=contiguous)
            ),
            num_partitions,
        )
        gaps.append(ours.step_seconds / best.step_seconds - 1)
    assert min(gaps) >= -1e-9
    assert sum(gap <= 0.02 for gap in gaps) >= 0.95 * len(gaps)


@pytest.mark.parametrize("optimize", OPTIMIZE)
@pytest.mark.parametrize("num_partitions", [2, 3, 8])
def test_chains_are_cut_at_the_best_places(optimize: str, num_partitions: int) -> None:
    for seed in range(3):
        graph = random_chain(60, seed)
        ours = partition_units(graph, num_partitions, made_for(MACHINE, 8, optimize=optimize))
        best = optimal_units(graph, num_partitions, made_for(MACHINE, 8, optimize=optimize))
        assert evaluate(
            graph, ours, num_partitions, made_for(MACHINE, 8)
        ).step_seconds == pytest.approx(
            evaluate(graph, best, num_partitions, made_for(MACHINE, 8)).step_seconds
        )


@pytest.mark.parametrize("num_partitions", [2, 4, 8])
@pytest.mark.parametrize("make", [random_chain, random_dag])
def test_no_plan_is_worse_than_a_simple_heuristic(make, num_partitions: int) -> None:
    others = baselines()
    for seed in range(3):
        graph = make(80, seed)
        heuristics = [
            others.equal_layers(graph, num_partitions),
            others.block_partition(graph, num_partitions, MACHINE),
            others.metis(graph, num_partitions, MACHINE),
        ]
        for contiguous in (True, False):
            ours = plan(graph, num_partitions, optimize="speed", contiguous=contiguous)
            step = predict(graph, ours, num_partitions).step_seconds
            for placed in heuristics:
                if placed is None or (
                    contiguous and excess_pieces(problem_of(graph, num_partitions), placed)
                ):
                    continue
                theirs = predict(graph, placed, num_partitions).step_seconds
                assert step <= theirs * (1 + 1e-9)


@given(unit_graphs(), MACHINES, st.integers(1, 5), st.booleans(), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_no_plan_is_worse_than_runs_of_units(
    graph: CoarseGraph, machine: Machine, num_partitions: int, contiguous: bool, tightness: int
) -> None:
    problem = problem_of(graph, num_partitions, machine)
    runs = [
        evaluate(graph, placed, num_partitions, made_for(machine, 4))
        for placed in simple_runs(problem)
        if not contiguous or not excess_pieces(problem, placed)
    ]
    if not runs:
        return
    # The caps are what these plans need: some of them fit, some do not.
    cap = sorted(max(run.peak_bytes) for run in runs)[min(tightness, len(runs) - 1)]
    machine = replace(machine, memory_bytes=cap)
    placed = partition_units(
        graph, num_partitions, made_for(machine, 4, optimize="speed", contiguous=contiguous)
    )
    ours = evaluate(graph, placed, num_partitions, made_for(machine, 4))
    assert max(ours.peak_bytes) <= cap
    fitting = [run.step_seconds for run in runs if max(run.peak_bytes) <= cap]
    assert ours.step_seconds <= min(fitting) * (1 + 1e-9)


@pytest.mark.parametrize("contiguous", [True, False])
def test_memory_makes_the_fullest_device_smaller_than_speed_does(contiguous: bool) -> None:
    graph = random_dag(60, seed=1)
    by_bytes = predict(graph, plan(graph, 4, optimize="memory", contiguous=contiguous), 4)
    by_time = predict(graph, plan(graph, 4, optimize="speed", contiguous=contiguous), 4)
    assert max(by_bytes.peak_bytes) <= (1 + MEMORY_TOLERANCE) * max(by_time.peak_bytes)
    assert by_time.step_seconds <= by_bytes.step_seconds


def test_speed_balances_time_and_memory_balances_bytes() -> None:
    # The first unit takes as long as all others, the last one keeps as much as all others.
    seconds = [3.0, 1.0, 1.0, 1.0]
    graph = unit_graph(
        seconds, [(i, (i + 1,), 1) for i in range(3)], residual_bytes=[0, 0, 0, 1000]
    )
    assert plan(graph, 2, optimize="speed") == [0, 1, 1, 1]
    assert plan(graph, 2, optimize="memory") == [0, 0, 0, 1]


def test_transfer_decides_where_arithmetic_is_even() -> None:
    graph = unit_graph([1.0] * 4, [(0, (1,), 1), (1, (2,), 900_000), (2, (3,), 1)])
    assert plan(graph, 2, optimize="speed") in ([0, 1, 1, 1], [0, 0, 0, 1])


def test_plan_keeps_to_the_memory_although_it_costs_time() -> None:
    graph = unit_graph(
        [3.0, 1.0, 1.0, 1.0], [(i, (i + 1,), 1) for i in range(3)], residual_bytes=[0, 0, 0, 1000]
    )
    machine = replace(MACHINE, memory_bytes=2400)
    placed = partition_units(graph, 2, made_for(machine, 4, optimize="speed"))
    assert max(evaluate(graph, placed, 2, made_for(machine, 4)).peak_bytes) <= 2400
    assert placed.tolist() == [0, 0, 0, 1]


def test_one_unit_leaves_the_other_partitions_empty() -> None:
    graph = unit_graph([1.0], [])
    assert plan(graph, 3) == [0]
    assert predict(graph, [0], 3).empty_partitions == (1, 2)


def test_no_units_make_an_empty_plan() -> None:
    assert plan(unit_graph([], []), 3) == []


def test_fewer_units_than_partitions_get_one_each() -> None:
    assert plan(chain([1.0, 1.0]), 5) == [0, 1]


def test_units_that_cost_nothing_are_cut_as_well() -> None:
    assert sorted(set(plan(chain([0.0] * 6, num_bytes=0), 3))) == [0, 1, 2]


def test_frozen_units_count_without_their_backward_pass() -> None:
    # 1 s for each of six frozen units, 3 s for each of three trained ones.
    graph = chain([1.0] * 9, num_bytes=0, frozen=range(6))
    stages = predict(graph, plan(graph, 3, optimize="speed"), 3)
    # Not which units: five frozen ones and then one with a trained one are as good as six.
    busy = [a + b for a, b in zip(stages.forward_seconds, stages.backward_seconds, strict=True)]
    assert (sum(busy), max(busy)) == (15.0, 6.0)
    assert stages.backward_seconds[0] == 0.0


def test_towers_are_kept_whole_if_contiguous() -> None:
    # Units 0-3 and 4-7 are towers, unit 8 reads both.
    edges = [(i, (i + 1,), 1) for i in (0, 1, 2, 4, 5, 6)] + [(3, (8,), 1), (7, (8,), 1)]
    graph = unit_graph([1.0] * 9, edges)
    placed = plan(graph, 2, optimize="speed")
    assert placed in ([0] * 4 + [1] * 5, [1] * 4 + [0] * 4 + [1])


def test_towers_may_be_cut_across_if_not_contiguous() -> None:
    # Four towers of unequal length: only in pieces do they make equal halves.
    edges = [(0, (4,), 1), (1, (4,), 1), (2, (4,), 1), (3, (4,), 1)]
    graph = unit_graph([1.0, 1.0, 1.0, 2.0, 1.0], edges)
    apart = predict(graph, plan(graph, 2, optimize="speed", contiguous=False), 2)
    together = predict(graph, plan(graph, 2, optimize="speed", contiguous=True), 2)
    assert apart.balance < 1.05
    assert together.balance > 1.3


def test_contiguity_is_given_up_if_nothing_else_fits_the_memory() -> None:
    # A unit that reads four others, of which any one fits beside it, but not two.
    graph = unit_graph([1.0] * 5, [(i, (4,), 0) for i in range(4)], residual_bytes=0)
    machine = replace(MACHINE, memory_bytes=900)
    placed = partition_units(graph, 2, made_for(machine, 1))
    assert max(evaluate(graph, placed, 2, made_for(machine, 1)).peak_bytes) <= 900
    assert excess_pieces(problem_of(graph, 2), placed) > 0


def test_encoder_is_not_sent_to_more_partitions_than_need_be() -> None:
    # Three encoder units; six decoder units in a row that all read the last of these.
    size = 9
    edges = [(0, (1,), 10), (1, (2,), 10), (2, tuple(range(3, size)), 20_000)]
    edges += [(i, (i + 1,), 10) for i in range(3, size - 1)]
    graph = unit_graph([1.0] * size, edges)
    for num_partitions in (2, 3, 4):
        ours = predict(graph, plan(graph, num_partitions, optimize="speed"), num_partitions)
        best = optimal_units(graph, num_partitions, made_for(MACHINE, 4, optimize="speed"))
        least = predict(graph, best, num_partitions).step_seconds
        assert ours.step_seconds <= 1.02 * least


def test_units_with_a_large_tied_embedding_come_together_if_that_is_faster() -> None:
    table = SharedVariable((0, 3), parameter_bytes=10_000_000, gradient_bytes=10_000_000)
    edges = [(0, (1, 3), 1), (1, (2,), 1)]
    graph = unit_graph([1.0, 1.0, 1.0, 1.0], edges, shared=[table])
    placed = plan(graph, 2, optimize="speed")
    assert placed[0] == placed[3]


@pytest.mark.parametrize("optimize", in_turn(OPTIMIZE, len(OPTIMIZE)))
def test_plan_does_not_depend_on_the_process_or_its_hash_seed(optimize: str) -> None:
    program = (
        "import sys; sys.path[:0] = sys.argv[1:3]\n"
        "from compiler.plan.unit_graphs import made_for, random_dag\n"
        "from opensmp.compiler.plan.unit_graph import Machine\n"
        "from opensmp.compiler.plan.partitioner.partitioner import partition_units\n"
        f"settings = made_for(Machine(), 8, optimize={optimize!r})\n"
        "for seed in range(3):\n"
        "    print(partition_units(random_dag(50, seed), 4, settings).tolist())\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program, str(ROOT / "src"), str(ROOT / "tests")],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    here = [
        partition_units(random_dag(50, seed), 4, made_for(Machine(), 8, optimize=optimize)).tolist()
        for seed in range(3)
    ]
    assert outputs == {"".join(f"{placed}\n" for placed in here)}


def test_large_graph_takes_no_more_than_a_few_seconds() -> None:
    graph = random_chain(20_000, seed=0)
    placed = partition_units(graph, 8, made_for(MACHINE, 8, optimize="speed"))
    assert evaluate(graph, placed, 8, made_for(MACHINE, 8)).balance < 1.01


def test_memory_that_no_plan_meets_says_how_much_is_missing_and_what_helps() -> None:
    graph = chain([1.0] * 8, residual_bytes=1000)
    machine = replace(MACHINE, memory_bytes=6 * 1024)
    with pytest.raises(PlanError) as failure:
        partition_units(graph, 2, made_for(machine, 4, pipeline="simple"))
    message = str(failure.value)
    # Half of the units: 1,200 B of variables, 16,000 B kept, 400 B at the boundary.
    assert "fits into 6 KiB per device. The best one needs 17.19 KiB in partition 0" in message
    assert "11.19 KiB too much" in message
    assert "1.172 KiB for variables, gradients and optimizer state" in message
    assert "16.02 KiB for what 4 microbatches in flight keep and exchange" in message
    assert "What would help: 8 partitions: 4.98 KiB per device; or a smaller microbatch" in message
    # GPipe keeps as many examples in smaller microbatches.
    assert "not even 128 microbatches are enough alone: 17.05 KiB per device" in message
    assert "recomputing in the backward pass" in message
    assert "devices of 17.19 KiB" in message


def test_unit_that_is_too_large_by_itself_is_not_helped_by_more_partitions() -> None:
    with pytest.raises(PlanError, match="more partitions, though not even 16 are enough alone"):
        partition_units(chain([1.0] * 4), 2, made_for(replace(MACHINE, memory_bytes=200), 4))


def test_all_wrong_arguments_are_named_at_once() -> None:
    with pytest.raises(PlanError) as failure:
        partition_units(chain([1.0]), 0, made_for(MACHINE, 0, optimize="fast"))
    message = str(failure.value)
    assert "num_partitions is an integer >= 1, received 0" in message
    assert "microbatches is an integer >= 1, received 0" in message
    assert "optimize is 'memory' or 'speed', received 'fast'" in message


@pytest.mark.parametrize(("size", "count"), [(600, 64), (1000, 64), (2000, 256)])
def test_a_shortage_of_many_partitions_is_told(size: int, count: int) -> None:
    """Remedies try up to eight times as many partitions, more than there are places to cut."""
    graph = replace(chain([1.0] * size), parameter_bytes=np.full(size, 100_000))
    settings = made_for(replace(MACHINE, memory_bytes=1000), 512)
    with pytest.raises(PlanError) as failure:
        partition_units(graph, count, settings)
    message = str(failure.value)
    assert f"no cut into {count} partitions" in message
    assert f"not even {8 * count} are enough alone" in message
    assert "Most of it is for 'unit" in message
