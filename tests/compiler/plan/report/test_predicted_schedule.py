from __future__ import annotations

import pytest
from compiler.plan.hand_made import chain, plan_of
from hypothesis import given
from hypothesis import strategies as st

from opensmp.compiler.plan.report.predicted_schedule import predict_schedule, stages
from opensmp.compiler.plan.unit_graph import CutTensor, Machine, SharedVariable
from opensmp.compiler.schedule.actions import Action


def seconds_of(plan, text):
    return predict_schedule(plan).graph.seconds[Action.parse(text)]


@given(st.integers(1, 4), st.integers(1, 6), st.sampled_from(["simple", "interleaved"]))
def test_devices_are_busy_for_as_long_as_their_stages_take(partitions, microbatches, pipeline):
    plan = plan_of(
        chain(partitions),
        range(partitions),
        partitions,
        pipeline=pipeline,
        microbatches=microbatches,
    )
    busy = predict_schedule(plan).simulation.busy_seconds
    assert busy == pytest.approx([microbatches * s for s in plan.prediction.stage_seconds])


def test_equal_stages_take_as_long_as_the_formula_says():
    tensors = [CutTensor(i, (i + 1,), 1, 1) for i in range(2)]
    graph = chain(3, tensors=tensors)
    machine = Machine(transfer_seconds=0.0)
    plan = plan_of(graph, [0, 1, 2], 3, microbatches=5, pipeline="simple", machine=machine)
    assert plan.prediction.step_seconds == pytest.approx(9 + 4 * 3)
    assert predict_schedule(plan).simulation.makespan_seconds == pytest.approx(9 + 4 * 3)


def test_receiver_pays_for_the_transfer():
    plan = plan_of(chain(2), [0, 1], 2)
    assert seconds_of(plan, "0F0") == 1
    assert seconds_of(plan, "1F0") == 1 + 1.5  # 0.5 s and 100 B at 100 B/s
    assert seconds_of(plan, "0B0") == 2 + 1.5
    assert seconds_of(plan, "1B0") == 2


def test_copy_of_a_shared_variable_is_paid_for():
    shared = SharedVariable((0, 1), 50, 50)
    plan = plan_of(chain(2, tensors=[], shared=[shared]), [0, 1], 2)
    assert seconds_of(plan, "1F0") == 1 + 1
    assert seconds_of(plan, "0B0") == 2 + 1


def test_towers_do_not_wait_for_each_other_but_their_gradients_do():
    plan = plan_of(chain(2, tensors=[]), [0, 1], 2, microbatches=1)
    needs = predict_schedule(plan).graph.needs
    assert needs[Action.parse("1F0")] == frozenset()
    assert needs[Action.parse("0B0")] == {Action.parse("0F0"), Action.parse("1F0")}


def test_frozen_stage_has_no_backward_action():
    graph = chain(2, tensors=[CutTensor(0, (1,), 100, 0)])
    graph.backward_seconds[0] = 0
    actions = predict_schedule(plan_of(graph, [0, 1], 2, microbatches=1)).graph.device
    assert {action.text for action in actions} == {"0F0", "1F0", "1B0"}


def test_stages_are_partitions_where_tensors_only_go_up():
    assert stages(chain(4), plan_of(chain(4), [0, 1, 1, 3], 4).assignment).tolist() == [0, 1, 1, 2]


def test_partition_that_is_come_back_to_has_several_stages():
    plan = plan_of(chain(4), [0, 1, 0, 1], 2, microbatches=2)
    assert stages(plan.costs, plan.assignment).tolist() == [0, 1, 2, 3]
    table = predict_schedule(plan)
    assert {table.graph.device[Action("F", s, 0)] for s in (0, 2)} == {0}
    assert table.schedule.name == "interleaved"


def test_empty_partition_does_nothing():
    table = predict_schedule(plan_of(chain(2), [0, 2], 3))
    assert table.simulation.busy_seconds[1] == 0


@pytest.mark.parametrize("pipeline", ["zb_v", "v_half", "v_min", "dualpipe_v", "auto"])
def test_each_visit_of_a_v_is_a_stage(pipeline):
    plan = plan_of(chain(4), [0, 1, 1, 0], 2, microbatches=5, pipeline=pipeline)
    predicted = predict_schedule(plan)
    device = predicted.graph.device
    assert [device[Action("F", stage, 0)] for stage in range(3)] == [0, 1, 0]
    # The two pieces of partition 1 follow each other, as one stage.
    assert {action.segment for action in device} == {0, 1, 2}
    busy = predicted.simulation.busy_seconds
    assert busy == pytest.approx([5 * s for s in plan.prediction.stage_seconds])


def test_an_own_schedule_is_predicted_as_it_is(tmp_path):
    def all_forward_first(graph):
        orders = [[] for _ in range(graph.num_devices)]
        for action in sorted(graph.device, key=lambda a: (a.kind != "F", a.microbatch, -a.segment)):
            orders[graph.device[action]].append(action)
        return [sorted(order, key=lambda action: action.kind == "W") for order in orders]

    plan = plan_of(chain(4), [0, 0, 1, 1], 2, own=all_forward_first)
    schedule = predict_schedule(plan).schedule
    assert schedule.name.endswith("all_forward_first")
    assert [action.kind for action in schedule.orders[1]] == ["F"] * 4 + ["B"] * 4 + ["W"] * 4
    assert plan.simulate().settings["pipeline"] == schedule.name
    # Files do not have it.
    plan.save(tmp_path / "plan.json")
    assert type(plan).load(tmp_path / "plan.json").settings.own is None
