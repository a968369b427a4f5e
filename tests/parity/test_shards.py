"""Every optimizer has the same bits with `shard_optimizer_state` and without it: see `shards`."""

from __future__ import annotations

import pathlib

import pytest
from parity import shards
from processes import check_ranks
from turns import in_turn

SCRIPT = str(pathlib.Path(shards.__file__))
NAMES = list(shards.OPTIMIZERS)
TOGETHER = 5  # optimizers in one run, which costs the start of TensorFlow
SOME = ["Adam", "accumulation, global_clipnorm", "several"]


def check(ranks, partitions, names):
    results = check_ranks(SCRIPT, ranks, args=[partitions, *names], seconds=900)
    for name in names:
        assert all(f"{name}, steps: " in result.output for result in results)


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("first", in_turn(range(0, len(NAMES), TOGETHER), 6))
def test_two_replicas(first):
    check(2, 1, NAMES[first : first + TOGETHER])


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("partitions", in_turn([2, 1], 2))
def test_four_ranks(partitions):
    """Two replicas of two partitions, and four replicas."""
    check(4, partitions, SOME)
