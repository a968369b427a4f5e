from __future__ import annotations

import pytest

from opensmp.compiler.cluster.cluster import Cluster
from opensmp.compiler.simulation import search as module
from opensmp.compiler.simulation.search import SEARCHED, search
from opensmp.compiler.simulation.simulate import machine_for, simulate_transformer
from opensmp.compiler.simulation.transformer import MODELS, Transformer
from opensmp.errors import PlanError

MODEL = Transformer(12, 1024, 16, 1024, 32000)
SMALL = Cluster(2, 4, {"memory": "1.4GB", "flops": 1e13, "bandwidth": 1e12})
OPTIONS = {"offload": False, "tensor_parallel": 1}


def candidates(cluster, batch, pipelines=SEARCHED):
    return list(module._runs(MODEL, cluster, batch, pipelines, ("none", "full"), OPTIONS))


def test_bounds_are_below_what_is_simulated():
    costs = module._Costs(MODEL, SMALL, machine_for(SMALL, MODEL.precision), 24)
    runs = candidates(SMALL, 24)
    assert len(runs) > 200
    for run in runs[::37]:
        step = simulate_transformer(MODEL, SMALL, run, 24)
        assert costs.least_seconds(run) <= step.seconds * (1 + 1e-9), run
        assert costs.least_bytes(run) <= step.peak_bytes + 1, run
        assert costs.bytes(run) == pytest.approx(step.peak_bytes, abs=1), run


def test_the_first_result_is_the_fastest_of_all_that_fit():
    names = ("interleaved", "zero_bubble", "v_half")
    options = {"recompute": ("none", "full"), "shard_optimizer_state": False}
    found = search(MODEL, SMALL, 8, pipelines=names, **options)
    runs = candidates(SMALL, 8, names)
    steps = [simulate_transformer(MODEL, SMALL, run, 8) for run in runs]
    fitting = [step.seconds for step in steps if step.fits]
    assert 0 < len(fitting) < len(steps)
    assert found[0].seconds == min(fitting)
    seconds = [step.seconds for step in found]
    assert seconds == sorted(seconds)
    assert len({(step.run.partitions, step.run.pipeline, step.seconds) for step in found}) > 1
    assert all(step.fits for step in found)


def test_options_narrow_the_search():
    best = search(MODEL, SMALL, 16, pipelines=("zb_v",), recompute=("full",), most=3)
    assert len(best) <= 3
    assert {step.run.recompute for step in best} == {"full"}
    assert {step.run.pipeline for step in best} <= {"zb_v", "simple"}  # one partition has no order


def test_what_comes_closest_is_told_if_nothing_fits():
    tiny = Cluster(1, 2, {"memory": "100MB", "flops": 1e13, "bandwidth": 1e12})
    with pytest.raises(PlanError, match=r"nothing was found that fits 95.4 MiB.* needs .*GiB|MiB"):
        search(MODEL, tiny, 8)


def test_unknown_schedules_are_refused():
    with pytest.raises(PlanError, match="'auto' cannot be searched"):
        search(MODEL, SMALL, 8, pipelines=("auto",))
    with pytest.raises(PlanError, match="most is an integer >= 1"):
        search(MODEL, SMALL, 8, most=0)


def test_thousands_of_devices_are_searched_in_seconds():
    cluster = Cluster(512, 8, "h100", between="infiniband-ndr")
    best = search(MODELS["llama3-405b"], cluster, 2048, most=1)[0]
    assert best.fits
    assert best.run.partitions * best.run.replicas <= 4096
    assert best.run.shard_optimizer_state


def test_over_machines_all_that_is_found_fits():
    machines = Cluster(8, 1, {"memory": 3e9, "flops": 1e14, "bandwidth": 1e12})
    steps = search(Transformer(24, 1024, 16, 512, 32000), machines, 64, most=50)
    assert steps
    assert all(step.fits for step in steps)
