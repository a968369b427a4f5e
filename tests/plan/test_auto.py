from __future__ import annotations

import itertools

import keras
import pytest
import tensorflow as tf

from opensmp.errors import PlanError
from opensmp.graph import trace
from opensmp.plan import PlanSettings, auto_plan
from opensmp.plan.coarse import Machine
from opensmp.plan.coarsen import coarsen

X = tf.ones([2, 8])


@pytest.fixture(scope="module")
def traced():
    model = keras.Sequential([keras.layers.Dense(8, name=f"dense_{i}") for i in range(8)])
    model(X)
    return trace(model.__call__, [X], {}, name="chain")


def turns(plan):
    """The partitions in the order in which the layers run through them."""
    places = [place for label, place in plan.layers.items() if "dense" in label]
    return [place for place, _ in itertools.groupby(places)]


@pytest.mark.parametrize("pieces", [1, 2, 3])
@pytest.mark.parametrize("optimize", ["memory", "speed"])
def test_partitions_take_pieces_by_turns(traced, pieces, optimize):
    plan = auto_plan(traced, 2, PlanSettings(microbatches=4, pieces=pieces, optimize=optimize))
    assert turns(plan) == [0, 1] * pieces
    assert plan.num_partitions == 2


def test_all_pieces_of_a_device_share_its_memory(traced):
    needed = int(sum(coarsen(traced, Machine()).parameter_bytes))
    small = Machine(memory_bytes=needed // 4)
    with pytest.raises(PlanError, match=r"into 2 partitions .* fits into 576 B per device"):
        auto_plan(traced, 2, PlanSettings(machine=small))
    with pytest.raises(PlanError, match=r"into 288 B per device.*pieces_per_partition=2"):
        auto_plan(traced, 2, PlanSettings(machine=small, pieces=2))
