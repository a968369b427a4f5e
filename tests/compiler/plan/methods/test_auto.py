from __future__ import annotations

import itertools

import keras
import pytest
import tensorflow as tf

from opensmp.compiler.plan.coarsening.coarsen import coarsen
from opensmp.compiler.plan.methods.auto import auto_plan
from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.plan.unit_graph import PROCESSES, Machine
from opensmp.compiler.trace.trace import trace
from opensmp.errors import PlanError

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


def attention_model():
    x = inputs = keras.Input((32, 64))
    for _ in range(3):
        h = keras.layers.LayerNormalization()(x)
        x = x + keras.layers.MultiHeadAttention(4, 16)(h, h)
        h = keras.layers.LayerNormalization()(x)
        x = x + keras.layers.Dense(64)(keras.layers.Dense(256, activation="gelu")(h))
    return keras.Model(inputs, keras.layers.Dense(300)(x))


def test_between_processes_fewer_tensors_travel():
    model, x = attention_model(), tf.ones([4, 32, 64])
    model(x)
    traced = trace(model.__call__, [x], {}, name="attention")
    settings = PlanSettings(microbatches=4, optimize="speed", machine=PROCESSES)
    plan = auto_plan(traced, 2, settings)
    stream = 4 * 32 * 64 * 4  # bytes of x, the only tensor between two blocks
    assert [dict(row.sends) for row in plan.rows] == [{1: stream}, {}]
    near = auto_plan(traced, 2, PlanSettings(microbatches=4, optimize="speed"))
    assert near.rows[0].sends[1] > stream
