"""Predicted memory with offloaded residuals, and the proposal to offload them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from compiler.plan.unit_graphs import two_units

from opensmp.compiler.plan.cost_model import evaluate
from opensmp.compiler.plan.partitioner.partitioner import partition_units
from opensmp.compiler.plan.recompute_levels import Choice
from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.plan.unit_graph import Machine
from opensmp.config.offload import MOST_RESIDENT
from opensmp.errors import PlanError

HELD = 12
GRAPH = two_units(
    layers=("first", "second"),
    full_bytes=np.array([0, 0]),
)
NONE = PlanSettings(microbatches=HELD, active_microbatches=HELD)


def peaks(**changes):
    return evaluate(GRAPH, [0, 1], 2, replace(NONE, **changes)).peak_bytes


def test_residuals_of_few_microbatches_are_in_memory():
    away = HELD - MOST_RESIDENT
    assert np.subtract(peaks(), peaks(offload="residuals")).tolist() == [away * 100, away * 40]
    assert np.subtract(peaks(), peaks(offload=((1, "residuals"),))).tolist() == [0, away * 40]


def test_few_microbatches_in_flight_are_all_in_memory():
    few = {"active_microbatches": MOST_RESIDENT}
    assert peaks(**few, offload="residuals") == peaks(**few)


def test_auto_recomputes_what_is_in_memory():
    settings = replace(
        NONE, offload="residuals", recompute="auto", machine=Machine(memory_bytes=200)
    )
    found = evaluate(GRAPH, [0, 1], 2, settings)
    assert found.recompute == (Choice("full", MOST_RESIDENT), Choice())
    assert found.peak_bytes[0] <= 200


def test_offloading_is_proposed_with_what_it_needs():
    most = replace(NONE, pipeline="simple")
    with pytest.raises(PlanError, match=r"by offload='residuals': 322 B per device"):
        partition_units(GRAPH, 2, replace(most, machine=Machine(memory_bytes=330)))
    with pytest.raises(PlanError, match=r"by offload='residuals'.*not enough alone"):
        partition_units(GRAPH, 2, replace(most, machine=Machine(memory_bytes=50)))
    # The schedule holds three, although twelve may be in flight.
    with pytest.raises(PlanError) as caught:
        partition_units(GRAPH, 2, replace(NONE, machine=Machine(memory_bytes=50)))
    assert "offload" not in str(caught.value)
    few = replace(NONE, active_microbatches=MOST_RESIDENT, machine=Machine(memory_bytes=50))
    with pytest.raises(PlanError) as caught:
        partition_units(GRAPH, 2, few)
    assert "offload" not in str(caught.value)


def test_a_plan_is_found_by_offloading_alone():
    settings = replace(NONE, offload="residuals", machine=Machine(memory_bytes=330))
    placed = partition_units(GRAPH, 2, settings)
    assert max(evaluate(GRAPH, placed, 2, settings).peak_bytes) <= 330


def test_settings_say_it():
    assert "offload 'residuals'" in str(replace(NONE, offload="residuals"))
    assert "offload" not in str(NONE)
