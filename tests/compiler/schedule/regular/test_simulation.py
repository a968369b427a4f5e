from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from opensmp.compiler.schedule.methods import breadth_first, v_half, zb_h2
from opensmp.compiler.schedule.regular import simulation as module
from opensmp.compiler.schedule.regular.pipeline import RegularPipeline, RegularSchedule
from opensmp.compiler.schedule.regular.simulation import simulate_regular
from opensmp.compiler.schedule.simulate import simulate
from opensmp.errors import ScheduleError


def fault_of(simulation: Callable[[], object]) -> str:
    try:
        simulation()
    except ScheduleError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("seed", range(60))
def test_agrees_with_the_simulation_of_objects(seed: int) -> None:
    rng = random.Random(seed)
    pipeline = RegularPipeline(
        rng.randint(1, 5),
        rng.randint(1, 6),
        rng.randint(1, 3),
        rng.choice(["loop", "v"]),
        rng.choice([(1.0, 1.0, 1.0), (1.0, 2.0, 0.0), (0.5, 0.75, 1.5), (0.0, 1.0, 1.0)]),
    )
    regular = pipeline.schedule("swapped", breadth_first.passes)
    passes = [each.copy() for each in regular.passes]
    for _ in range(rng.randint(0, 6)):  # exchanges neighbours, so that some orders cannot run
        each = rng.choice(passes)
        i = rng.randrange(len(each) - 1)
        each[[i, i + 1]] = each[[i + 1, i]]
    regular = RegularSchedule("swapped", pipeline, tuple(passes))
    graph = pipeline.graph()
    transfer = rng.choice([0.0, 0.25, 3.0])
    fault = fault_of(lambda: simulate(regular.schedule(), graph, transfer))
    assert fault_of(lambda: simulate_regular(regular, transfer)) == fault
    if fault:
        return
    expected = simulate(regular.schedule(), graph, transfer)
    result = simulate_regular(regular, transfer)
    assert result.makespan_seconds == expected.makespan_seconds
    assert result.bubble == pytest.approx(expected.bubble)
    assert tuple(result.busy_seconds) == pytest.approx(expected.busy_seconds)
    assert tuple(result.live_activations) == expected.live_activations
    assert result.peak_in_flight == expected.peak_in_flight
    for action, end in expected.end.items():
        assert result.end["FBW".index(action.kind), action.segment, action.microbatch] == end


def test_faults_are_those_of_the_objects() -> None:
    pipeline = RegularPipeline(2, 2)
    good = pipeline.schedule("broken", zb_h2.passes)
    doubled = good.passes[0].copy()
    doubled[1] = doubled[0]
    with pytest.raises(ScheduleError, match=r"missing: 0F1 .*\n- doubled: 0F0 is there 2 times"):
        simulate_regular(RegularSchedule("broken", pipeline, (doubled, good.passes[1])))
    with pytest.raises(ScheduleError, match="there is 1 order for 2 devices"):
        simulate_regular(RegularSchedule("broken", pipeline, good.passes[:1]))


def test_large_faulty_schedule_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_OBJECTS", 0)
    pipeline = RegularPipeline(2, 2)
    good = pipeline.schedule("broken", zb_h2.passes)
    with pytest.raises(ScheduleError, match="not each of its passes exactly once; make it for"):
        simulate_regular(RegularSchedule("broken", pipeline, good.passes[:1]))
    turned = RegularSchedule("turned", pipeline, tuple(p[::-1] for p in good.passes))
    with pytest.raises(ScheduleError, match=r"'turned'.*wait for each other for ever"):
        simulate_regular(turned)


def test_negative_transfer_is_refused() -> None:
    schedule = RegularPipeline(2, 2).schedule("zb_h2", zb_h2.passes)
    with pytest.raises(ScheduleError, match=r"transfer_seconds=-1 is not possible"):
        simulate_regular(schedule, -1)


def test_large_pipelines_take_few_bytes_and_their_formulas_hold() -> None:
    pipeline = RegularPipeline(128, 512, 2, "v")
    simulation = simulate_regular(pipeline.schedule("v_half", v_half.passes))
    assert simulation.makespan_seconds == 6 * 512 + (7 * 128 - 6) // 2
    assert max(simulation.live_activations) == 130
    assert np.isfinite(simulation.end).all()
