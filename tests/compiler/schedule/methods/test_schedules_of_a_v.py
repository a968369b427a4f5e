"""What all schedules of a V have in common; the files of each have their formulas."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from opensmp.compiler.schedule.methods import dualpipe_v, v_half, v_min, zb_v
from opensmp.compiler.schedule.regular.passes import BACKWARD
from opensmp.compiler.schedule.simulate import simulate
from opensmp.errors import ScheduleError
from schedules import is_drawn_in_docstring, simulated, v_chain

pytestmark = pytest.mark.parametrize(
    "module", [dualpipe_v, v_half, v_min, zb_v], ids=lambda module: name_of(module)
)
MICROBATCHES_DRAWN = {"dualpipe_v": 3, "v_half": 2, "v_min": 2, "zb_v": 3}


def name_of(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def method_of(module: ModuleType) -> Any:
    return getattr(module, name_of(module))


@pytest.mark.parametrize("partitions", [1, 2, 3, 8])
@pytest.mark.parametrize("microbatches", [1, 2, 3, 5])
def test_few_microbatches_and_a_first_segment_whose_backward_pass_is_whole(
    module: ModuleType, partitions: int, microbatches: int
) -> None:
    graph = v_chain(partitions, microbatches)
    schedule = method_of(module)(graph, microbatches)
    assert schedule.active_microbatches is None, "its own order fits the graph"
    long = simulate(schedule, graph).makespan_seconds
    simulation = simulated(module.passes, partitions, microbatches)
    assert long <= simulation.makespan_seconds + 2
    assert (simulation.end[BACKWARD] > 0).all()


def test_picture(module: ModuleType) -> None:
    method = method_of(module)
    graph = v_chain(2, MICROBATCHES_DRAWN[name_of(module)])
    assert is_drawn_in_docstring(method(graph, 3), graph, method)


def test_refuses_a_bound_of_zero(module: ModuleType) -> None:
    with pytest.raises(ScheduleError, match=f"'{name_of(module)}': active_microbatches=0"):
        method_of(module)(v_chain(2, 2), 0)


def test_keeps_a_bound(module: ModuleType) -> None:
    graph = v_chain(3, 9)
    schedule = method_of(module)(graph, 2)
    assert schedule.active_microbatches == 2
    assert simulate(schedule, graph).peak_in_flight <= 2
