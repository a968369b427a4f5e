from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from opensmp import _private
from opensmp.config import Config
from opensmp.distributed.collectives import updates
from opensmp.distributed.collectives.chunks import CHUNK_BYTES
from opensmp.distributed.world import World


class Sized:
    """Stands for a variable of so many numbers of 4 bytes."""

    def __init__(self, number):
        self.shape, self.dtype = (number,), tf.float32


def lengths(found):
    return [[[v.shape[0] for v in share] for share in each.shares] for each in found]


def test_small_variables_travel_together():
    found = updates.rounds([[Sized(3), Sized(5)], [Sized(7)]], 4)
    assert lengths(found) == [[[5, 3], [7]]]
    assert found[0].length == 8


def test_large_variables_travel_with_those_of_other_replicas():
    large = CHUNK_BYTES // 4 + 1
    found = updates.rounds([[Sized(1), Sized(large)], [Sized(large), Sized(2)]], 4)
    assert lengths(found) == [[[large], [large]], [[1], [2]]]


@pytest.mark.parametrize("replicas", [2, 3])
def test_every_variable_travels_once_and_little_is_padding(replicas):
    random = np.random.default_rng(replicas)
    sizes = [random.integers(1, CHUNK_BYTES // 2, 30) for _ in range(replicas)]
    shares = [[Sized(int(size)) for size in each] for each in sizes]
    found = updates.rounds(shares, 4)
    for i, share in enumerate(shares):
        sent = [v for each in found for v in each.shares[i]]
        assert sorted(map(id, sent)) == sorted(map(id, share))
    for each in found:
        assert max(sum(v.shape[0] for v in share) for share in each.shares) == each.length
    total = sum(each.length for each in found)
    assert total <= 1.5 * max(each.sum() for each in sizes)


def test_nothing_travels_of_nothing():
    assert updates.rounds([[], []], 4) == []


def world(replicas, sharded=True):
    config = Config(partitions=1, shard_optimizer_state=sharded)
    ranks = tuple(range(replicas))
    return World(config, ("CPU:0",), rank=1, size=replicas, mp_group=(1,), dp_group=ranks)


@pytest.mark.parametrize("replicas", [2, 4])
def test_bytes_are_balanced(replicas):
    made = updates.updates_of(world(replicas))
    assert made is not None
    _private.shard_with(made)
    try:
        sizes = [64, 8, 8, 8, 40, 8, 16, 8, 8, 24, 8, 56]
        variables = [keras.Variable(np.zeros(size, "float32")) for size in sizes]
        counter = keras.Variable(0.0)
        counter.overwrite_with_gradient = True
        made.divide([*variables, counter])
        updaters = [_private.updater_of(v) for v in variables]
        loads = [
            sum(s for s, u in zip(sizes, updaters, strict=True) if u == replica)
            for replica in range(replicas)
        ]
        assert sum(loads) == sum(sizes)
        assert max(loads) - min(loads) <= 8
        assert _private.updater_of(counter) is None
        made.divide(list(reversed(variables)))  # and it stays
        assert [_private.updater_of(v) for v in variables] == updaters
    finally:
        _private.shard_with(None)


def test_variables_of_each_process_are_divided_by_themselves():
    made = updates.updates_of(world(2))
    _private.shard_with(made)
    try:
        variables = [keras.Variable(np.zeros(size, "float32")) for size in (8, 8, 4, 4)]
        for i, variable in enumerate(variables):
            _private.set_home(variable, _private.Home(i // 2, (10**6 + i,), variable.path))
        made.divide(variables)
        assert [_private.updater_of(v) for v in variables] == [0, 1, 0, 1]
    finally:
        _private.shard_with(None)


@pytest.mark.parametrize(("replicas", "sharded"), [(1, True), (2, False)])
def test_nothing_is_divided_without_the_key_or_with_one_replica(replicas, sharded):
    alone = World(Config(partitions=1, shard_optimizer_state=sharded), ("CPU:0",))
    assert updates.updates_of(alone if replicas == 1 else world(2, sharded)) is None
