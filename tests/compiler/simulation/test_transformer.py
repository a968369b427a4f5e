from __future__ import annotations

import pytest

from opensmp.compiler.cluster.cluster import Cluster
from opensmp.compiler.cluster.layout import Layout
from opensmp.compiler.plan.unit_graph import Machine
from opensmp.compiler.simulation.segments import layers_of, segments_of
from opensmp.compiler.simulation.transformer import MODELS, Transformer, model_named
from opensmp.errors import PlanError

MEGATRON = {"fused_attention": False, "dropout": True, "precision": "float16"}


def test_parameters_are_the_published_ones():
    published = {"gpt3-175b": 175, "llama3-8b": 8.0, "llama3-70b": 70.6, "llama3-405b": 405.9}
    for name, billions in published.items():
        model = MODELS[name]
        extra = model.head_parameters if name.startswith("llama") else 0  # not tied
        assert (model.parameters + extra) / 1e9 == pytest.approx(billions, rel=0.01), name


def test_flops_are_those_of_megatrons_formula():
    """Equation 3 of arXiv 2104.04473, which counts the recomputed forward pass."""
    length, width, layers, size = 2048, 12288, 80, 51200
    model = Transformer(layers, width, 96, length, size, **MEGATRON)
    formula = 96 * length * layers * width**2
    formula *= 1 + length / (6 * width) + size / (16 * layers * width)
    again = 4 * layers * (model.product_flops + model.attention_flops) + 3 * model.head_flops
    assert again == pytest.approx(formula)


def test_activations_are_those_of_the_formula():
    """Equations 1 and 2 of arXiv 2205.05198, without and with tensor parallelism."""
    s, h, a = 1024, 2048, 16
    model = Transformer(24, h, a, s, 50304, **MEGATRON)
    one = model.shared_bytes + model.product_bytes + model.score_bytes
    assert one == s * h * (34 + 5 * a * s // h)
    eighth = model.shared_bytes + (model.product_bytes + model.score_bytes) / 8
    assert eighth == s * h * (10 + 24 / 8 + 5 * a * s / (h * 8))
    assert Transformer(24, h, a, s, 50304).score_bytes == 0


@pytest.mark.parametrize("layers", [1, 5, 24, 62])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("vocabulary", [100, 50304, 1_000_000])
def test_slowest_segment_is_as_quick_as_can_be(layers, count, vocabulary):
    model = Transformer(layers, 1024, 8, 512, vocabulary)
    head = model.head_flops / (model.product_flops + model.attention_flops)
    found = layers_of(model, count)
    assert found.sum() == layers
    assert (found >= 0).all()
    slowest = max([*found[:-1], found[-1] + head])
    least = min(
        max(last + head, -(-(layers - last) // (count - 1)) if count > 1 else 0)
        for last in (range(layers + 1) if count > 1 else [layers])
    )
    assert slowest == pytest.approx(least)


def test_segments_add_up_to_the_model():
    model = Transformer(10, 512, 8, 256, 1000, **MEGATRON)
    machine = Machine(flops_per_second=1e12, bytes_per_second=1e15)
    alone = Layout(Cluster(), 1, 1).sharers
    found = segments_of(model, 4, 3, machine, alone)
    flops = 1e12 * (found.forward - found.traffic).sum()
    assert 3 * flops == pytest.approx(3 * model.step_flops)
    assert found.parameter_bytes.sum() == 4 * (model.parameters + model.head_parameters)
    assert segments_of(model, 1, 3, machine, alone).parameter_bytes == 4 * model.parameters
    assert (found.sent_bytes == 3 * 256 * 512 * 2).all()
    assert not found.shared.any()


def test_devices_that_share_a_partition_divide_it_and_sum_up():
    model = Transformer(8, 512, 8, 256, 1000)
    machine, cluster = Machine(flops_per_second=1e12), Cluster(1, 8, within=1e9)
    one = segments_of(model, 2, 1, machine, Layout(cluster, 1, 1).sharers)
    four = segments_of(model, 2, 1, machine, Layout(cluster, 2, 1, width=4).sharers)
    assert four.weights == pytest.approx(one.weights / 4)
    assert four.parameter_bytes == pytest.approx(one.parameter_bytes / 4)
    sharers = Layout(cluster, 2, 1, width=4).sharers
    layers = layers_of(model, 2)
    assert four.shared == pytest.approx(
        2 * layers * sharers.all_reduce_seconds(model.boundary_bytes)
    )


def test_all_faults_are_told_at_once():
    with pytest.raises(PlanError) as caught:
        Transformer(0, 10, 3, True, 1.5, mlp_width=-1, precision="int8")
    for part in (
        "layers is",
        "sequence is",
        "vocabulary is",
        "mlp_width is",
        "precision is one of",
    ):
        assert part in str(caught.value)
    with pytest.raises(PlanError, match="heads=3 must divide width=10"):
        Transformer(1, 10, 3, 4, 5)
    with pytest.raises(PlanError, match="key_value_heads=3 must divide heads=4"):
        Transformer(1, 8, 4, 4, 5, key_value_heads=3)


def test_models_are_found_by_name():
    assert model_named("Llama3-70B") is MODELS["llama3-70b"]
    with pytest.raises(PlanError, match=r"llama3-7b.*did you mean 'llama3-8b'|did you mean"):
        model_named("llama3-7b")
