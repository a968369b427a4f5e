"""`fit`, `evaluate`, `predict` and callbacks in several processes, against plain Keras.

The reference is plain Keras in one process, with the whole batch, in double precision.
"""

from __future__ import annotations

import functools
import pathlib
import pickle
import tempfile
from typing import Any

import pytest
from parity.rotation import part_of_today
from processes import check_ranks
from training import uses
from training.uses import USES
from turns import in_turn

SCRIPT = str(pathlib.Path(__file__).with_name("shared.py"))

# Number of processes, partitions.
WORLDS = {"pipeline": (2, 2), "replicas": (2, 1), "hybrid": (4, 2)}
MICROBATCHES = 3

TODAY = {
    "pipeline": ["saved", "shown", "stopping"],
    "replicas": ["arrays", "tokens", "resumed", "printed"],
    "hybrid": ["tokens"],
}
"""What runs every day, with one use more in each world, another every day."""


@functools.cache
def plain(name: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return uses.record(name, pathlib.Path(folder), plain=True)


def check(world: str, names: list[str], folder: pathlib.Path) -> None:
    num_processes, partitions = WORLDS[world]
    config = {"partitions": partitions, "microbatches": MICROBATCHES}
    results = check_ranks(SCRIPT, num_processes, config, args=[folder, *names], seconds=600)
    for name in names:
        for result in results:
            found = pickle.loads((folder / f"{name}-{result.rank}.pickle").read_bytes())
            error = uses.difference(plain(name), found, result.rank)
            assert error <= USES[name].bound, f"{name}, rank {result.rank}: {error}"
    done = [f"{name} done" for name in names]
    for result in results[1:]:  # what Keras prints is printed once
        assert [line for line in result.lines if line.startswith("Epoch ") or "━" in line] == []
        assert [line for line in result.lines if line.endswith(" done")] == done


@pytest.mark.parametrize("world", in_turn(WORLDS, len(WORLDS)))
def test_several_processes_give_the_numbers_of_plain_keras(world, tmp_path):
    others = [(name, world) for name in USES if name not in TODAY[world]]
    check(world, [*TODAY[world], *(name for name, _ in part_of_today(others, 1))], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_several_processes_give_the_numbers_of_plain_keras_in_all_uses(world, tmp_path):
    check(world, list(USES), tmp_path)
