from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opensmp.compiler.plan.coarsening.contraction import (
    chained,
    contracted,
    joined,
    reduced,
    topological_order,
)
from opensmp.errors import PlanError


@st.composite
def graphs(draw, most=14):
    size = draw(st.integers(1, most))
    return [
        set(draw(st.lists(st.integers(0, node - 1), max_size=3))) if node else set()
        for node in range(size)
    ]


def is_acyclic(needs):
    try:
        return len(topological_order(needs)) == len(needs)
    except PlanError:
        return False


def test_a_contracted_graph_has_the_edges_between_groups():
    assert contracted([[], [0], [0], [1, 2]], [0, 1, 1, 2]) == [set(), {0}, {1}]


def test_the_order_is_the_numbers_where_these_are_one():
    assert topological_order([[], [0], [0], [1, 2]]) == [0, 1, 2, 3]
    assert topological_order([[2], [], [1]]) == [1, 2, 0]


def test_a_cycle_is_refused_with_its_nodes():
    with pytest.raises(
        PlanError, match=r"2 of its 3 nodes wait for each other, among them \[1, 2\]"
    ):
        topological_order([[], [2], [1]])


def test_pairs_are_joined_unless_a_path_leaves_and_comes_back():
    chain = [[], [0], [1], [2]]
    assert joined(chain, [(0, 1)]) == ([0, 0, 1, 2], [])
    assert joined(chain, [(0, 3)]) == ([0, 1, 2, 3], [(0, 3)])
    assert joined(chain, [(0, 3), (1, 2)])[0] == [0, 1, 1, 2]


def test_towers_with_shared_layers_are_joined_layer_by_layer():
    towers = [[], [0], [1], [], [3], [4], [2, 5]]
    groups, refused = joined(towers, [(0, 3), (1, 4), (2, 5)])
    assert (groups, refused) == ([0, 1, 2, 0, 1, 2, 3], [])


def test_only_the_bad_pair_of_many_is_refused():
    towers = [[], [0], [1], [], [3], [4], [2, 5]]
    groups, refused = joined(towers, [(0, 3), (1, 4), (0, 6), (2, 5)])
    assert refused == [(0, 6)]
    assert groups[1] == groups[4]


def test_the_search_ends_where_all_pairs_are_bad():
    size = 3000
    ring = [[] if not node else [node - 1] for node in range(size)]
    groups, refused = joined(ring, [(node, node + 10) for node in range(size - 10)])
    assert is_acyclic(contracted(ring, groups))
    assert refused


def test_light_nodes_go_to_their_only_reader():
    inf = float("inf")
    needs = [[], [0], [], [1, 2]]
    assert chained(needs, [1.0, inf, 1.0, inf], 10.0, by_reader=True) == [0, 0, 1, 1]
    assert chained(needs, [1.0, inf, 1.0, inf], 0.5, by_reader=True) == [0, 1, 2, 3]
    assert chained(needs, [inf, 1.0, inf, 1.0], 10.0, by_reader=False) == [0, 0, 1, 2]


def test_long_chains_become_few_even_groups():
    size, most = 5000, 50
    chain = [[] if not node else [node - 1] for node in range(size)]
    groups = reduced(chain, [1.0] * size, most)
    counts = [groups.count(group) for group in set(groups)]
    assert len(counts) <= most
    assert max(counts) <= 4 * size / most


def test_a_heavy_node_keeps_its_boundaries():
    chain = [[] if not node else [node - 1] for node in range(101)]
    weights = [1.0] * 101
    weights[50] = 1000.0
    groups = reduced(chain, weights, 20)
    assert groups.count(groups[50]) < 101
    assert groups[0] != groups[50] != groups[100]


def test_nodes_that_weigh_nothing_are_joined_as_well():
    web = [[], [], [0, 1], [0, 1], [2, 3], [2, 3]]
    groups = reduced(web, [0.0] * 6, 2)
    assert len(set(groups)) <= 2
    assert is_acyclic(contracted(web, groups))


@settings(max_examples=60, deadline=None)
@given(graphs(), st.data())
def test_joined_graphs_stay_acyclic_and_only_bad_pairs_are_refused(needs, data):
    node = st.integers(0, len(needs) - 1)
    pairs = data.draw(st.lists(st.tuples(node, node).filter(lambda p: p[0] != p[1]), max_size=6))
    groups, refused = joined(needs, pairs)
    graph = contracted(needs, groups)
    assert is_acyclic(graph)
    for a, b in pairs:
        if (a, b) not in refused:
            assert groups[a] == groups[b]
        elif groups[a] != groups[b]:  # one more would make a cycle
            merged = [
                min(groups[a], groups[b]) if g in (groups[a], groups[b]) else g for g in groups
            ]
            number = {g: i for i, g in enumerate(dict.fromkeys(merged))}
            assert not is_acyclic(contracted(needs, [number[g] for g in merged]))


@settings(max_examples=60, deadline=None)
@given(graphs(), st.data())
def test_chained_and_reduced_graphs_stay_acyclic(needs, data):
    weights = data.draw(
        st.lists(st.floats(0, 10), min_size=len(needs), max_size=len(needs)), label="weights"
    )
    most = data.draw(st.integers(1, len(needs)))
    for by_reader in (True, False):
        assert is_acyclic(contracted(needs, chained(needs, weights, 5.0, by_reader=by_reader)))
    groups = reduced(needs, weights, most)
    assert is_acyclic(contracted(needs, groups))
    assert max(groups) + 1 <= most
