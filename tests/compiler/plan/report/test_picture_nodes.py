from __future__ import annotations

from compiler.plan.hand_made import chain, plan_of
from hypothesis import given
from hypothesis import strategies as st

from opensmp.compiler.plan.report.picture_nodes import condense
from opensmp.compiler.plan.unit_graph import CutTensor


@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 40))
def test_condensed_graph_has_every_unit_once_and_all_the_time(num_units, num_partitions, most):
    plan = plan_of(
        chain(num_units),
        [min(u * num_partitions // num_units, num_partitions - 1) for u in range(num_units)],
        num_partitions,
    )
    graph = condense(plan, most)
    assert sorted(unit for node in graph.nodes for unit in node.units) == list(range(num_units))
    assert sum(node.seconds for node in graph.nodes) == 3 * num_units
    assert len(graph.nodes) <= max(most, 3 * num_partitions)
    assert [band.partition for band in graph.bands] == list(range(num_partitions))
    assert all(edge.source < edge.target for edge in graph.edges)


def test_units_of_a_layer_make_up_one_node():
    graph = condense(plan_of(chain(4, layers=["a", "b", "b", "c"]), [0, 0, 0, 1], 2))
    assert [(node.name, node.units) for node in graph.nodes] == [
        ("a", (0,)),
        ("b", (1, 2)),
        ("c", (3,)),
    ]


def test_names_that_have_most_in_common_are_joined_first():
    layers = ["stem", "block1_conv", "block1_norm", "block2_conv", "head"]
    graph = condense(plan_of(chain(5, layers=layers), [0] * 5, 1), 4)
    assert [node.name for node in graph.nodes] == ["stem", "block1 (2)", "block2_conv", "head"]


def test_joined_names_without_anything_in_common_show_both_ends():
    graph = condense(plan_of(chain(4, layers=["stem", "conv", "pool", "head"]), [0] * 4, 1), 3)
    assert [node.name for node in graph.nodes] == ["stem … conv", "pool", "head"]


def test_edges_sum_tensors_and_know_which_are_cut():
    tensors = [
        CutTensor(0, (1,), 10, 10),
        CutTensor(0, (1, 2), 5, 5),
        CutTensor(1, (2,), 7, 7),
    ]
    graph = condense(plan_of(chain(3, tensors=tensors), [0, 0, 1], 2))
    assert [tuple(edge) for edge in graph.edges] == [
        (0, 1, 15, False),
        (0, 2, 5, True),
        (1, 2, 7, True),
    ]


def test_empty_partition_has_a_band_in_its_place():
    bands = condense(plan_of(chain(2), [0, 2], 3)).bands
    assert [(band.partition, band.nodes) for band in bands] == [(0, (0,)), (1, ()), (2, (1,))]


def test_partition_that_is_come_back_to_has_a_band_for_each_stay():
    bands = condense(plan_of(chain(4), [0, 1, 0, 1], 2)).bands
    assert [band.partition for band in bands] == [0, 1, 0, 1]
