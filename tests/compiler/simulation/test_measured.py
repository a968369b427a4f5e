from __future__ import annotations

import dataclasses

import pytest
from compiler.plan.hand_made import chain, plan_of

from opensmp.compiler.plan.report.predicted_schedule import timed_stages
from opensmp.compiler.schedule.actions import Action
from opensmp.compiler.simulation.measured import alternatives, recut, with_measured_seconds
from opensmp.compiler.simulation.plan_step import timed_passes
from opensmp.config.recompute import FULL


def timed(plan, factor):
    tasks, simulation = timed_passes(plan)
    return [
        (a, device, factor[device] * (simulation.end[a] - simulation.start[a]))
        for a, device in tasks.device.items()
    ]


def test_stages_take_as_long_as_was_measured():
    plan = plan_of(chain(8), [0, 0, 0, 0, 1, 1, 2, 2], 3)
    found, why = with_measured_seconds(plan, timed(plan, [1.0, 2.0, 0.5]))
    assert why == ""
    before, after = timed_stages(plan), timed_stages(found)
    assert after.forward == pytest.approx(before.forward * [1.0, 2.0, 0.5])
    assert after.backward == pytest.approx(before.backward * [1.0, 2.0, 0.5])


def test_a_pass_that_was_interrupted_does_not_count():
    plan = plan_of(chain(4), [0, 0, 1, 1], 2, microbatches=5)
    events = timed(plan, [1.0, 1.0])
    slow = [(a, p, 100 * s if a == Action("F", 0, 2) else s) for a, p, s in events]
    found, _ = with_measured_seconds(plan, slow)
    assert timed_stages(found).forward == pytest.approx(timed_stages(plan).forward)


def test_a_pass_for_the_weights_of_all_microbatches_counts_once():
    plan = plan_of(chain(4), [0, 0, 1, 1], 2, microbatches=4)
    events = [e for e in timed(plan, [1.0, 1.0]) if e[0].kind != "W"]
    joint = [*events, (Action("W", 1, 0), 1, 8.0)]
    before, after = (with_measured_seconds(plan, each)[0] for each in (events, joint))
    more = timed_stages(after).backward - timed_stages(before).backward
    assert more == pytest.approx([0.0, 2.0])


def test_a_hand_over_that_was_measured_is_the_latency_of_transfers():
    """The plan's is for cores of any speed: it would be most of a step of short passes."""
    plan = plan_of(chain(4), [0, 0, 1, 1], 2, microbatches=4)
    slow = dataclasses.replace(plan.settings.machine, transfer_seconds=50.0)
    plan = dataclasses.replace(
        plan, settings=dataclasses.replace(plan.settings, machine=slow), make_graph=None
    )
    events = timed(plan, [1.0, 1.0])
    bubbles = []
    for seconds in (None, 80.0, 1.0, 0.0):
        found, _ = with_measured_seconds(plan, events, seconds)
        bubbles.append(found.simulate().bubble)
    assert bubbles[0] == bubbles[1]
    assert bubbles[1] > bubbles[2] > bubbles[3]


def test_measuring_what_was_predicted_changes_nothing():
    plan = plan_of(chain(8), [0, 0, 0, 1, 1, 1, 2, 2], 3)
    found, _ = with_measured_seconds(plan, timed(plan, [1.0] * 3))
    assert found.simulate().bubble == pytest.approx(plan.simulate().bubble)
    assert found.simulate().seconds == pytest.approx(plan.simulate().seconds)


def test_passes_of_the_plan_are_those_that_it_simulates():
    plan = plan_of(chain(8), [0, 0, 0, 1, 1, 1, 2, 2], 3, microbatches=6)
    assert timed_passes(plan)[1].bubble == plan.simulate().bubble


@pytest.mark.parametrize(
    "wrong",
    [
        lambda events: [(Action("F", 9, 0), 0, 1.0), *events],
        lambda events: [(a, 1 - p, s) for a, p, s in events],
        lambda events: [e for e in events if e[1] == 0],
    ],
)
def test_a_step_of_another_model_is_told_apart(wrong):
    plan = plan_of(chain(4), [0, 0, 1, 1], 2)
    found, why = with_measured_seconds(plan, wrong(timed(plan, [1.0, 1.0])))
    assert found is None
    assert "not those of this plan" in why


def test_recomputation_is_told_apart():
    plan = plan_of(chain(4), [0, 0, 1, 1], 2, recompute=FULL)
    found, why = with_measured_seconds(plan, [])
    assert found is None
    assert "recomputed" in why


def test_alternatives_are_simulations_of_the_plan():
    plan = plan_of(chain(8), [0, 0, 1, 1, 2, 2, 3, 3], 4)
    first, *others = alternatives(plan)
    assert first.settings == {}
    assert first.step.bubble == plan.simulate().bubble
    kinds = [each.settings for each in others]
    assert {"microbatches": 8} in kinds
    assert {"microbatches": 16} in kinds
    assert {"pipeline": "zero_bubble"} in kinds
    for each in others:
        assert each.step.bubble == plan.simulate(**each.settings).bubble


def test_alternatives_that_would_take_too_long_are_left_out():
    plan = plan_of(chain(64), list(range(64)), 64, microbatches=20)
    first, *others = [each.settings for each in alternatives(plan)]
    assert first == {}
    assert {"microbatches": 80} not in others


def test_another_cut_is_compared_by_its_slowest_partition():
    plan = plan_of(chain(8), [0, 0, 0, 0, 0, 0, 1, 1], 2)
    now, then = recut(plan)
    assert now == max(plan.prediction.stage_seconds)
    assert then < now
    assert recut(plan_of(chain(4), [0, 0, 0, 0], 1)) is None
