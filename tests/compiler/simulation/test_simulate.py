from __future__ import annotations

import ast
import json

import numpy as np
import pytest

from opensmp.compiler.cluster.cluster import Cluster
from opensmp.compiler.cluster.layout import Layout
from opensmp.compiler.cluster.links import Link
from opensmp.compiler.simulation.run import Run
from opensmp.compiler.simulation.segments import segments_of
from opensmp.compiler.simulation.simulate import machine_for, simulate_transformer
from opensmp.compiler.simulation.step import PARTS
from opensmp.compiler.simulation.transformer import MODELS, Transformer
from opensmp.config import Config
from opensmp.errors import PlanError

MODEL = Transformer(24, 1024, 16, 512, 32000)
CLUSTER = Cluster(4, 8, "a100")


def step_of(run: Run, batch: int = 64, model: Transformer = MODEL, cluster: Cluster = CLUSTER):
    return simulate_transformer(model, cluster, run, batch)


def costs_of(run: Run, batch: int = 64):
    examples = batch // (run.replicas * run.microbatches)
    sharers = Layout(CLUSTER, run.partitions, run.replicas).sharers
    machine = machine_for(CLUSTER, MODEL.precision)
    return segments_of(MODEL, run.num_segments, examples, machine, sharers)


def test_one_partition_takes_the_sum_of_its_passes():
    run = Run(microbatches=4)
    step, costs = step_of(run), costs_of(run)
    passes = 4 * float((costs.forward + costs.backward + costs.weights).sum())
    assert step.bubble == 0
    assert step.seconds == pytest.approx(passes + step.parts["update of weights"])
    assert sum(step.parts.values()) == pytest.approx(step.seconds)
    assert step.parts["sum of gradients"] == 0


def test_memory_is_that_of_weights_and_of_held_microbatches():
    run = Run(partitions=4, microbatches=8)
    step, costs = step_of(run), costs_of(run)
    expected = (
        costs.parameter_bytes * (4 + 4 + 2 + 8) / 4 + np.array([4, 4, 3, 1]) * costs.kept_bytes
    )
    assert list(step.memory_bytes) == pytest.approx(expected.tolist(), rel=1e-9)
    everything = step_of(Run(partitions=4, microbatches=8, pipeline="simple"))
    assert everything.held == 8
    assert everything.peak_bytes > step.peak_bytes


def test_a_v_balances_memory_over_partitions():
    step = step_of(Run(partitions=4, microbatches=8, pipeline="v_half"))
    assert step.run.pieces == 2
    assert max(step.memory_bytes[1:3]) < 1.1 * min(step.memory_bytes[1:3])
    assert step.held == 3


def test_recomputation_trades_time_for_memory():
    kinds = [step_of(Run(partitions=4, microbatches=8, recompute=r)) for r in ("none", "selective")]
    kinds.append(step_of(Run(partitions=4, microbatches=8, recompute="full")))
    seconds, memory = [k.seconds for k in kinds], [k.peak_bytes for k in kinds]
    assert seconds == sorted(seconds)
    assert memory == sorted(memory, reverse=True)
    assert len(set(seconds)) == len(set(memory)) == 3
    costs = costs_of(kinds[2].run)
    again = kinds[2].seconds - kinds[0].seconds
    assert again >= 8 * float(costs.forward.min())


def test_offloading_keeps_three_microbatches_and_waits_for_slow_hosts():
    run = Run(partitions=8, microbatches=16)
    away = Run(partitions=8, microbatches=16, offload="residuals")
    costs = costs_of(run)
    plain, offloaded = step_of(run), step_of(away, cluster=Cluster(4, 8, "a100", host="900GB"))
    assert plain.memory_bytes[0] - offloaded.memory_bytes[0] == pytest.approx(
        5 * float(costs.kept_bytes[0]), rel=1e-6
    )
    assert offloaded.seconds == pytest.approx(plain.seconds)
    slow = step_of(away, cluster=Cluster(4, 8, "a100", host=1e9))
    assert slow.seconds > plain.seconds
    assert slow.bound == "offloading"


def test_shards_divide_the_slots_and_the_update():
    whole = step_of(Run(partitions=2, replicas=8, microbatches=4))
    parts = step_of(Run(partitions=2, replicas=8, microbatches=4, shard_optimizer_state=True))
    slots = costs_of(whole.run).slot_bytes
    saved = np.array(whole.memory_bytes) - np.array(parts.memory_bytes)
    assert saved.tolist() == pytest.approx((slots * 7 / 8).tolist(), abs=1)
    assert parts.parts["update of weights"] == pytest.approx(whole.parts["update of weights"] / 8)
    assert parts.parts["sum of gradients"] == whole.parts["sum of gradients"]


def test_gradients_are_summed_up_after_the_step_or_in_its_last_microbatch():
    apart = step_of(Run(replicas=32, microbatches=2))
    costs = costs_of(apart.run)
    group = Layout(CLUSTER, 1, 32).replicas_of(0)
    reduction = group.all_reduce_seconds(float(costs.parameter_bytes[0]))
    assert apart.parts["sum of gradients"] == pytest.approx(reduction)
    hidden = step_of(Run(replicas=32, microbatches=2, overlap_all_reduce=True))
    assert reduction / 24 <= hidden.parts["sum of gradients"] < reduction


def test_sending_takes_time_of_the_device_only_if_it_blocks():
    slow = Cluster(8, 1, "a100", between=Link("", 1e9, 0.0))
    model = MODEL
    free = step_of(Run(partitions=8, microbatches=8), cluster=slow, model=model)
    blocked = step_of(
        Run(partitions=8, microbatches=8, blocking_transfers=True), cluster=slow, model=model
    )
    assert free.parts["sending"] == 0
    assert blocked.parts["sending"] > 0
    assert sum(blocked.parts.values()) == pytest.approx(blocked.seconds)


def test_replicas_that_are_spread_have_fast_links_to_each_other():
    near = step_of(Run(partitions=4, replicas=8, microbatches=4, placement_strategy="spread"))
    far = step_of(Run(partitions=4, replicas=8, microbatches=4))
    assert near.parts["sum of gradients"] < far.parts["sum of gradients"]


def test_over_machines_auto_is_no_slower_than_what_holds_no_more():
    small = Transformer(8, 512, 8, 128, 1000)
    machines = Cluster(4, 1, "a100", between="ethernet-10")

    def step(pipeline, active=None):
        run = Run(partitions=4, microbatches=16, pipeline=pipeline, active_microbatches=active)
        return step_of(run, 64, small, machines)

    auto = step("auto")
    for name in ("simple", "interleaved", "zero_bubble", "zb_h2", "breadth_first"):
        other = step(name)
        assert other.held > auto.held or auto.seconds <= 1.001 * other.seconds
    assert step("interleaved").seconds < 0.9 * step("interleaved", 4).seconds
    assert step("interleaved", 5).settings["active_microbatches"] == 5


def test_result_is_printed_and_used():
    step = step_of(Run(partitions=4, replicas=2, microbatches=8, shard_optimizer_state=True))
    text = str(step)
    for part in ("step     ", "memory   ", "bubble   ", "bound by ", "assumed  products at 243.4"):
        assert part in text
    settings = ast.literal_eval(text.partition("smp.init(")[2].rpartition(")")[0])
    assert (
        settings
        == step.settings
        == {
            "partitions": 4,
            "microbatches": 8,
            "pipeline": "interleaved",
            "active_microbatches": 4,
            "shard_optimizer_state": True,
        }
    )
    assert Config.resolve(settings)
    assert json.loads(json.dumps(step.to_dict()))["parts"].keys() == set(PARTS)
    assert "pre" in step._repr_html_()


def test_share_of_the_peak_is_that_of_the_models_flops():
    step = step_of(Run(partitions=4, replicas=2, microbatches=8))
    assert step.flops_share == pytest.approx(64 * MODEL.step_flops / (8 * 312e12 * step.seconds))
    numbers = {"memory": 10**10, "flops": 1e14, "bandwidth": 1e12}
    assert step_of(Run(), cluster=Cluster(device=numbers)).flops_share is None


def test_tensor_parallelism_is_only_for_descriptions_of_others():
    step = step_of(Run(partitions=2, tensor_parallel=8, microbatches=4))
    assert step.parts["tensor parallelism"] > 0
    assert "this library has no tensor parallelism" in str(step)


@pytest.mark.parametrize(
    ("run", "batch", "message"),
    [
        (Run(partitions=2, microbatches=3), 64, "choose 2 or 4 microbatches, or a batch of 66"),
        (Run(replicas=5), 64, "5 replicas x 1 microbatches"),
        (Run(partitions=40), 64, "need 40 devices, but the cluster has 32"),
        (Run(partitions=14, pieces=2), 64, "more than the 24 layers"),
        (Run(), 0, "a batch of 0"),
        (Run(recompute="auto"), 64, "recompute='auto' is for the layers"),
        (Run(partitions=2, offload={0: "residuals"}), 64, "offload=.* is for the layers"),
    ],
)
def test_what_cannot_be_is_refused(run, batch, message):
    with pytest.raises(PlanError, match=message):
        step_of(run, batch)


@pytest.mark.parametrize("device", [None, {"memory": "16GiB"}, {"flops": 1e12}])
def test_speed_of_the_devices_must_be_known(device):
    with pytest.raises(PlanError, match='Give the cluster a device, such as device="h100"'):
        step_of(Run(), cluster=Cluster(4, 8, device))


def test_faults_of_a_run_are_told_at_once():
    with pytest.raises(PlanError) as caught:
        Run(partitions=0, replicas=0, pipeline="zb_w", recompute="ful", active_microbatches=-1)
    for part in ("partitions is", "replicas is", "pipeline is", "recompute is", "active_micro"):
        assert part in str(caught.value)
    with pytest.raises(PlanError, match="which is for 2 pieces a partition"):
        Run(partitions=2, microbatches=4, pipeline="zb_v", pieces=3)
    with pytest.raises(PlanError, match="keeps all 4 microbatches in flight"):
        Run(partitions=2, microbatches=4, pipeline="simple", active_microbatches=2)


def test_a_large_run_is_simulated_in_little_time():
    cluster = Cluster(512, 8, "h100", between="infiniband-ndr")
    run = Run(partitions=126, replicas=32, microbatches=64, shard_optimizer_state=True)
    step = simulate_transformer(MODELS["llama3-405b"], cluster, run, 2048)
    assert 0.15 < (step.flops_share or 0) < 0.4
    assert step.bubble > 0.5
