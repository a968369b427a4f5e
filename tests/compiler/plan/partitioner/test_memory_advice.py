"""What is proposed if no plan fits: remedies that exist, each with what it would need."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from compiler.plan.hand_made import chain

from opensmp.compiler.plan.cost_model import evaluate
from opensmp.compiler.plan.partitioner.partitioner import partition_units
from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.plan.unit_graph import CutTensor, Machine
from opensmp.errors import PlanError


def heavy(state: int, residual: int):
    """Four units with much state or many residuals, and small tensors between them."""
    graph = chain(4, tensors=[CutTensor(i, (i + 1,), 1, 1, f"t{i}") for i in range(3)])
    return replace(
        graph,
        state_bytes=np.full(4, state),
        residual_bytes=np.full(4, residual),
        full_bytes=np.zeros(4, dtype=np.int64),
        selective_bytes=np.full(4, residual // 2),
    )


def told(graph, cap: int, **settings) -> str:
    machine = Machine(memory_bytes=cap)
    with pytest.raises(PlanError) as caught:
        partition_units(graph, 2, PlanSettings(machine=machine, **{"microbatches": 8, **settings}))
    return str(caught.value)


def test_every_remedy_has_a_figure():
    message = told(heavy(300, 100), 500, pipeline="simple")
    remedies = message.partition("What would help: ")[2].split("; or ")
    words = ("partitions", "microbatch", "recompute=", "offload='residuals'", "offload='optimizer'")
    words += ("shard_optimizer_state=", "devices")
    for remedy, word in zip(remedies, words, strict=True):
        assert word in remedy
        assert re.search(r"\d (B|KiB)", remedy), remedy


def test_shards_of_the_optimizers_state_are_proposed_where_they_help():
    # 2 units: 20 bytes of weights and 600 of state, of which two thirds are slots.
    message = told(heavy(300, 0), 500)
    assert "2 replicas that share the optimizer's state, by shard_optimizer_state=True" in message
    assert "422 B per device" in message
    few = told(heavy(300, 0), 100)
    assert "64 replicas" in few
    assert "not enough alone" in few
    assert "shard" not in told(heavy(0, 1000), 500)


def test_offloading_of_the_optimizers_state_is_proposed_with_what_is_offloaded_already():
    message = told(heavy(300, 0), 500)
    assert "the optimizer's state elsewhere between updates, by offload='optimizer'" in message
    needed = int(re.search(r"offload='optimizer': (\d+) B per device", message)[1])
    assert needed == 20 + 600 // 3 + 2  # weights and gradients; a slot rounds down for each unit
    message = told(heavy(300, 100), 500, pipeline="simple", offload="residuals")
    assert "offload='all'" in message
    assert "offload='residuals'" not in message
    message = told(heavy(300, 100), 100, pipeline="simple", offload="all")
    assert "offload=" not in message
    assert "shard_optimizer_state" not in message


def test_figure_of_a_remedy_is_what_the_plan_then_needs():
    graph = heavy(30, 100)
    message = told(graph, 1100, pipeline="simple")
    level, needed = re.search(r"by recompute='(\w+)': ([\d.]+) B per device", message).groups()
    needed = int(needed)
    settings = PlanSettings(8, "simple", recompute=level, machine=Machine(memory_bytes=needed))
    placed = partition_units(graph, 2, settings)
    peaks = evaluate(graph, placed, 2, settings, by_schedule=True).peak_bytes
    assert max(peaks) <= needed


def test_a_plan_that_fits_only_as_the_schedule_holds_less_is_found():
    """The last partition holds one microbatch, and so takes most of the units."""
    graph = heavy(0, 100)
    settings = PlanSettings(microbatches=8, machine=Machine(memory_bytes=340))
    placed = partition_units(graph, 2, settings)
    peaks = evaluate(graph, placed, 2, settings, by_schedule=True).peak_bytes
    assert max(peaks) <= 340
    assert set(placed.tolist()) == {0, 1}
    alike = evaluate(graph, placed, 2, settings).peak_bytes
    assert max(alike) > 340
