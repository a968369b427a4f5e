"""Predicted memory and time with recomputation, and how much of it a limit asks for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from compiler.plan.unit_graphs import two_units

from opensmp.compiler.plan.cost_model import evaluate
from opensmp.compiler.plan.partitioner.partitioner import partition_units
from opensmp.compiler.plan.recompute_levels import Choice
from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.plan.unit_graph import CoarseGraph, Machine
from opensmp.errors import PlanError

HELD = 4


def graph() -> CoarseGraph:
    return two_units(
        layers=("first", "second"),
        selective_bytes=np.array([30, 40]),
        full_bytes=np.array([2, 0]),
        selective_seconds=np.array([0.25, 0.0]),
    )


def predicted(recompute, memory=None):
    settings = PlanSettings(
        microbatches=HELD,
        active_microbatches=HELD,
        recompute=recompute,
        machine=Machine(memory_bytes=memory),
    )
    return evaluate(graph(), [0, 1], 2, settings)


def test_levels_keep_less_and_add_time_to_the_backward_pass():
    none, selective, full = (predicted(level) for level in ("none", "selective", "full"))
    assert none.peak_bytes[0] - selective.peak_bytes[0] == (HELD - 1) * 70
    assert none.peak_bytes[0] - full.peak_bytes[0] == (HELD - 1) * 98
    assert [p.backward_seconds[0] for p in (none, selective, full)] == [2.0, 2.25, 3.0]
    assert none.step_seconds < selective.step_seconds < full.step_seconds


def test_levels_by_partition_and_layer():
    none = predicted("none")
    of_partition = predicted((("default", "none"), ("partitions", ((1, "full"),)), ("layers", ())))
    assert of_partition.peak_bytes[0] == none.peak_bytes[0]
    assert of_partition.peak_bytes[1] == none.peak_bytes[1] - (HELD - 1) * 40
    of_layer = predicted((("default", "full"), ("partitions", ()), ("layers", (("f*", "none"),))))
    assert of_layer.peak_bytes == of_partition.peak_bytes


@pytest.mark.parametrize(
    ("memory", "choice"),
    [(414, Choice()), (413, Choice("selective", 2)), (274, Choice("selective", 3)),
     (204, Choice("selective", 4)), (203, Choice("full", 4))],
)  # fmt: skip
def test_auto_recomputes_as_little_as_the_limit_asks_for(memory, choice):
    assert predicted("none").peak_bytes[0] == 414
    found = predicted("auto", memory)
    assert found.recompute == (choice, Choice())
    assert found.peak_bytes[0] <= memory


def test_a_level_is_had_by_that_many_of_the_microbatches_in_flight():
    levels = [Choice("full", 2).level_of(m, HELD) for m in range(3 * HELD)]
    for start in range(2 * HELD):
        assert levels[start : start + HELD].count("full") == 2


def test_the_planner_finds_a_plan_by_recomputation_alone():
    machine = Machine(memory_bytes=204)
    settings = PlanSettings(microbatches=HELD, active_microbatches=HELD, machine=machine)
    # Of the four that may be in flight, the schedule holds three.
    with pytest.raises(PlanError, match="recompute='selective': 173 B per device"):
        partition_units(graph(), 2, settings)
    placed = partition_units(graph(), 2, replace(settings, recompute="auto"))
    assert placed.tolist() == [0, 1]
