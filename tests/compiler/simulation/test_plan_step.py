from __future__ import annotations

import numpy as np
import pytest
from compiler.plan.hand_made import chain, plan_of

from opensmp.compiler.cluster.cluster import Cluster
from opensmp.compiler.cluster.links import Link
from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.plan.unit_graph import CutTensor, Machine, SharedVariable
from opensmp.compiler.simulation.plan_step import rescaled
from opensmp.config.pipelines import PIPELINES
from opensmp.errors import PlanError

INSTANT = Link("", 2.0**59, 0.0)
HERE = Cluster(1, 64, within=INSTANT, between=INSTANT)


def net(units=6, partitions=3, **settings) -> Plan:
    assignment = np.repeat(np.arange(partitions), units // partitions).tolist()
    return plan_of(chain(units), assignment, partitions, **{"microbatches": 6, **settings})


def pipeline_seconds(step) -> float:
    return step.seconds - step.parts["update of weights"] - step.parts["sum of gradients"]


def test_a_plan_takes_the_time_of_its_schedule():
    """Stages of 2 s forward and 4 s backward, in halves: (P - 1) / (3 / 2 M + P - 1)."""
    step = net().simulate(HERE)
    assert step.bubble == pytest.approx(2 / (9 + 2))
    assert pipeline_seconds(step) == pytest.approx(2 * 22)
    whole = net().simulate(HERE, split_backward=False)
    assert whole.bubble == pytest.approx(2 / (6 + 2))
    assert step.run.microbatches == 6


def test_devices_of_the_plan_are_the_default():
    step = net(partitions=2, units=2, microbatches=1).simulate()
    # Forward and backward of two units, and a tensor of 100 bytes there and back.
    assert pipeline_seconds(step) == pytest.approx(1 + 1.5 + 1 + 1 + 1.5 + 2)
    assert step.cluster.num_devices == 2
    assert any("50 GFLOP/s" in line for line in step.assumed)


def test_links_within_and_between_machines_are_told_apart():
    links = {"within": Link("", 100.0, 0.0), "between": Link("", 10.0, 0.0)}
    plan = net(partitions=2, units=2, microbatches=1)
    near = pipeline_seconds(plan.simulate(Cluster(1, 2, **links)))
    far = pipeline_seconds(plan.simulate(Cluster(2, 1, **links)))
    assert far - near == pytest.approx(2 * (10 - 1))


@pytest.mark.parametrize("pipeline", sorted(PIPELINES))
def test_every_schedule_runs_a_plan(pipeline):
    step = net().simulate(HERE, pipeline=pipeline)
    assert 0 <= step.bubble < 0.5
    assert step.settings["pipeline"] == pipeline
    assert sum(step.parts.values()) == pytest.approx(step.seconds)


def test_a_plan_of_a_v_keeps_its_pieces():
    plan = plan_of(chain(8), [0, 0, 1, 1, 1, 1, 0, 0], 2, microbatches=8, pipeline="zb_v")
    step = plan.simulate(HERE)
    # A first stage without inputs to differentiate has no second half.
    assert step.bubble < 0.06
    assert step.run.pieces == 2


def test_an_own_schedule_is_simulated_as_it_is():
    def all_forward_first(graph):
        orders = [[] for _ in range(graph.num_devices)]
        for action in sorted(graph.device, key=lambda a: (a.kind != "F", a.microbatch, -a.segment)):
            orders[graph.device[action]].append(action)
        return [sorted(order, key=lambda a: a.kind == "W") for order in orders]

    step = net().simulate(HERE, pipeline=all_forward_first)
    assert step.held == 6
    assert step.settings["pipeline"].endswith("all_forward_first")


def test_memory_is_that_of_weights_and_of_what_the_schedule_holds():
    plan = net(microbatches=12)
    step = plan.simulate(HERE)
    assert step.held == 3
    # Two units a partition: 10 bytes of weights, 20 of state, 5 of residuals for each microbatch;
    # the tensors at the borders are 100 bytes each.
    assert step.memory_bytes == (60 + 3 * 110, 60 + 3 * 210, 60 + 1 * 110)
    assert plan.simulate(HERE, pipeline="simple").memory_bytes[0] == 60 + 12 * 110
    away = plan.simulate(HERE, pipeline="simple", offload="residuals")
    assert away.memory_bytes[0] == 60 + 12 * 100 + 3 * 10


def test_recomputation_and_shards_change_memory_and_time():
    plan = net(microbatches=12, active_microbatches=3)
    plain, again = plan.simulate(HERE), plan.simulate(HERE, recompute="full")
    assert again.seconds > plain.seconds
    # Nothing is kept, and 10 bytes exist once.
    assert plain.memory_bytes[0] - again.memory_bytes[0] == 3 * 10 - 10
    some = plan.simulate(HERE, recompute={"partitions": {0: "full"}})
    assert some.memory_bytes[0] == again.memory_bytes[0]
    assert some.memory_bytes[1] == plain.memory_bytes[1]
    assert some.settings["recompute"]["partitions"] == {"0": "full"}
    sharded = plan.simulate(HERE, replicas=4, shard_optimizer_state=True)
    assert plain.memory_bytes[0] - sharded.memory_bytes[0] == pytest.approx(
        40 * 2 / 3 * 3 / 4, abs=1
    )


def test_recompute_auto_recomputes_as_little_as_the_memory_asks_for():
    plan = net(microbatches=12, active_microbatches=3)
    free = plan.simulate(HERE, recompute="auto")
    assert free.memory_bytes == plan.simulate(HERE).memory_bytes
    full = plan.simulate(HERE, recompute="full")
    limit = Cluster(1, 3, {"memory": 680}, within=INSTANT)
    tight = plan.simulate(limit, recompute="auto")
    assert full.seconds >= tight.seconds > free.seconds
    assert tight.memory_bytes[1] < free.memory_bytes[1]


def test_replicas_sum_up_their_gradients():
    cluster = Cluster(4, 3, within=INSTANT, between=Link("", 10.0, 0.0))
    step = net().simulate(cluster, replicas=4)
    # A third of 40 bytes of state are gradients; a ring of four sends 2 x 3 / 4 of them.
    assert step.parts["sum of gradients"] == pytest.approx(40 / 3 * 1.5 / 10)


def test_times_are_scaled_to_other_devices():
    graph = chain(2)
    before = Machine(flops_per_second=2e9, bytes_per_second=1e9)
    after = Machine(flops_per_second=8e9, bytes_per_second=2e9)
    new = rescaled(graph, before, after)
    # Of 1 s forward, half is arithmetic: 1e9 FLOPs.
    assert new.forward_seconds.tolist() == [0.5 / 4 + 0.5 / 2] * 2
    assert new.backward_seconds.tolist() == [1 / 4 + 1 / 2] * 2
    assert rescaled(graph, before, Machine(2e9, 1e9, memory_bytes=5)) is graph
    fast = net().simulate(Cluster(1, 3, "h100"))
    assert fast.seconds < net().simulate(Cluster(1, 3, "v100")).seconds
    half = net().simulate(Cluster(1, 3, "h100"), precision="bfloat16")
    assert half.seconds < fast.seconds


def test_frozen_and_shared_parts_are_counted():
    graph = chain(4, shared=[SharedVariable((0, 3), 1000, 1000, "embedding")])
    step = plan_of(graph, [0, 0, 1, 1], 2, microbatches=2).simulate(HERE)
    assert min(step.memory_bytes) > 2000
    skips = [CutTensor(i, tuple(range(i + 1, 4)), 100, 0, f"t{i}") for i in range(3)]
    still = plan_of(chain(4, tensors=skips), [0, 1, 0, 1], 2, microbatches=2).simulate(HERE)
    assert still.seconds > 0  # forth and back, without gradients


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"replica": 2}, r"argument 'replica' is not known.*did you mean 'replicas'"),
        ({"tensor_parallel": 2}, "'tensor_parallel' is not known"),
        ({"replicas": 0}, "replicas is an integer"),
        ({"pipeline": "zb"}, "pipeline is"),
        ({"replicas": 30}, "need 90 devices, but the cluster has 64"),
        ({"microbatches": 50_000}, "more than the 60000 that are simulated for a plan"),
        ({"recompute": "some"}, "recompute is 'none'"),
    ],
)
def test_faults_are_told(given, message):
    with pytest.raises(PlanError, match=message):
        net().simulate(HERE, **given)


def test_a_plan_without_costs_is_refused():
    plan = net()
    bare = Plan(plan.model, 3, plan.partition_of, plan.calls)
    with pytest.raises(PlanError, match="not what they cost"):
        bare.simulate(HERE)


def test_what_is_no_cluster_is_refused():
    with pytest.raises(PlanError, match=r"an smp\.Cluster or None; received 'a100'"):
        net().simulate("a100")


def test_what_has_no_effect_is_said():
    told = " ".join(str(net().simulate(HERE, pipeline="zb_v", offload="residuals")).split())
    assert "not the 6 of 'zb_v'" in told
    assert "nothing is offloaded" not in str(net().simulate(HERE))
