from __future__ import annotations

import itertools
import random

from opensmp.compiler.recomputation.minimum_cut import UNLIMITED, FlowNetwork


def network_of(size: int, edges: dict[tuple[int, int], int]) -> FlowNetwork:
    network = FlowNetwork(size)
    for (tail, head), capacity in edges.items():
        network.connect(tail, head, capacity)
    return network


def crossing(edges: dict[tuple[int, int], int], side: frozenset[int]) -> int:
    return sum(c for (a, b), c in edges.items() if a not in side and b in side)


def test_cuts_are_the_smallest_of_all_and_the_nearest_to_the_sink():
    rng = random.Random(0)
    for _ in range(200):
        size = rng.randint(2, 7)
        pairs = [p for p in itertools.permutations(range(size), 2) if rng.random() < 0.4]
        edges = {pair: rng.choice([1, 2, 3, 7, 20]) for pair in pairs}
        side = network_of(size, edges).sink_side(0, 1)
        middle = range(2, size)
        every = [
            frozenset({1, *chosen})
            for n in range(size - 1)
            for chosen in itertools.combinations(middle, n)
        ]
        least = min(crossing(edges, each) for each in every)
        assert crossing(edges, side) == least
        assert all(len(side) <= len(each) for each in every if crossing(edges, each) == least)


def test_what_no_source_feeds_is_on_the_side_of_the_sink():
    network = network_of(4, {(2, 3): UNLIMITED, (3, 1): 5})
    assert network.sink_side(0, 1) == {1, 2, 3}


def test_long_chains_need_no_recursion():
    size = 20_000
    network = FlowNetwork(size)
    chain = [0, *range(2, size), 1]
    for tail, head in itertools.pairwise(chain):
        network.connect(tail, head, 3 if head == size // 2 else 5)
    assert network.sink_side(0, 1) == {1, *range(size // 2, size)}
