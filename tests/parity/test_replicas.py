"""Data parallelism, alone and with model parallelism, against plain Keras on the whole batch.

All runs in double precision: the whole batch's mean is one sum in plain Keras, and here a mean
over replicas of means over microbatches, so that no bits are equal.
"""

from __future__ import annotations

import functools
import pathlib
import pickle
from typing import Any

import numpy as np
import pytest
from parity import replicas
from parity.bounds import Bound
from processes import check_ranks
from turns import in_turn

SCRIPT = str(pathlib.Path(replicas.__file__))
MEANS_OF_MEANS = Bound(1e-12, "the mean over the batch is added in another order")
DIVIDED = Bound(
    1e-8,
    "the mean over the batch is added in another order, and Adam divides by the size of a "
    "gradient plus 1e-7: of a gradient near zero the error grows by as much",
)

SCHEDULES = ["simple", "early interleaved"]

# Number of processes, partitions: replicas of the whole model, and two replicas of two partitions.
WORLDS = {"data parallel": (2, 1), "hybrid 2 x 2": (4, 2)}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: Any) -> Any:
    """What all ranks of a world have; its processes run at the first question."""

    @functools.cache
    def run(world: str) -> pathlib.Path:
        num_processes, partitions = WORLDS[world]
        folder = tmp_path_factory.mktemp("replicas")
        names = list(replicas.MODELS)
        arguments = [folder, partitions, ",".join(SCHEDULES), *names]
        check_ranks(SCRIPT, num_processes, args=arguments, seconds=600)
        return pathlib.Path(folder)

    def get(world: str, schedule: str, name: str) -> list[Any]:
        return [
            pickle.loads((run(world) / f"{schedule}-{name}-{rank}.pickle").read_bytes())
            for rank in range(WORLDS[world][0])
        ]

    return get


plain = functools.cache(replicas.plain)


@pytest.mark.parametrize("name", replicas.MODELS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("world", in_turn(WORLDS, len(WORLDS)))
def test_replicas_on_shares_of_a_batch_give_the_numbers_of_the_whole_batch(
    parts: Any, world: str, schedule: str, name: str
) -> None:
    expected = plain(name)
    bound = DIVIDED if "Adam" in name else MEANS_OF_MEANS
    seen: set[str] = set()
    for rank, part in enumerate(parts(world, schedule, name)):
        assert part.keys() <= expected.keys()
        seen |= part.keys()
        for key, value in part.items():
            size = max(1e-3, float(np.max(np.abs(expected[key]))))
            error = float(np.max(np.abs(value - expected[key]))) / size
            assert error <= bound.relative, f"rank {rank}, {key}: {error}; {bound}"
    assert seen == expected.keys()


@pytest.mark.parametrize("world", in_turn(WORLDS, len(WORLDS)))
def test_replicas_stay_equal_bit_by_bit(parts: Any, world: str) -> None:
    for name in replicas.MODELS:
        first: dict[str, Any] = {}
        for part in parts(world, "early interleaved", name):
            for key, value in part.items():
                np.testing.assert_array_equal(value, first.setdefault(key, value), err_msg=key)
