"""Three epochs of real digits and of real text, in single precision, against plain Keras."""

from __future__ import annotations

import functools
import pickle

import pytest
from processes import check_ranks
from training import histories
from turns import in_turn, turn

BOUND = 1e-5
"""Of losses, relative, and of accuracies: Adam makes the noise of float32 no larger than that."""

MICROBATCHES = 4
WORLDS = {"one replica": (2, 2), "two replicas": (2, 1), "two replicas of two": (4, 2)}

plain = functools.cache(functools.partial(histories.history, plain=True))


def assert_equal(name, ours):
    assert max(histories.difference(plain(name), ours).values()) < BOUND
    losses = ours["loss"]
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("name", in_turn(histories.TRAININGS, len(histories.TRAININGS)))
@pytest.mark.parametrize(
    "partitions",
    [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 4],
)
def test_the_history_of_a_split_model_is_that_of_plain_keras(smp_init, partitions, name):
    smp_init({"partitions": partitions, "microbatches": MICROBATCHES})
    assert_equal(name, histories.history(name))


@turn(1, of=2)
@pytest.mark.parametrize(
    "world",
    [
        pytest.param("one replica", marks=pytest.mark.slow),
        "two replicas",
        pytest.param("two replicas of two", marks=pytest.mark.slow),
    ],
)
def test_the_history_of_replicas_is_that_of_plain_keras(world, tmp_path):
    num_processes, partitions = WORLDS[world]
    config = {"partitions": partitions, "microbatches": MICROBATCHES}
    check_ranks(histories.__file__, num_processes, config, args=[tmp_path])
    for rank in range(num_processes):
        found = pickle.loads((tmp_path / f"{rank}.pickle").read_bytes())
        for name in histories.TRAININGS:
            assert_equal(name, found[name])
