"""Groups of many ranks in one process: every rank is a thread, and their collectives are played.

TensorFlow's collective operations are replaced by functions that do the same between the threads,
with the order of rows that real processes were seen to have. So every operation can be tried over
groups of ranks that would need a thousand processes.

    with simulated_ranks(monkeypatch, (2, 9, 10)) as run:
        assert run(lambda rank: objects.allgather_objects(rank, (2, 9, 10))) == {...}
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from opensmp.config import Config
from opensmp.distributed import world
from opensmp.distributed.launch import cluster
from opensmp.distributed.world import World

GROUPS = [
    tuple(range(12)),
    (2, 10),
    (8, 9, 10, 11),
    (3, 20, 100, 1000),
    (9, 10, 11, 99, 100, 101, 1001),
]
"""Each has ranks of different numbers of digits."""

_SECONDS = 60  # after which a rank that waits alone fails


def by_name(ranks: Sequence[int]) -> list[int]:
    """The order in which TensorFlow counts processes, as the real ones showed: 0, 1, 10, 2, ..."""
    return sorted(ranks, key=str)


class _Exchange:
    """Where threads lay down what belongs together, and wait for the others of their group."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._rounds: Counter[Any] = Counter()
        self._laid: dict[Any, dict[int, Any]] = {}

    def of(self, key: Any, size: int, rank: int, value: Any) -> dict[int, Any]:
        """What each rank has laid down for the same use of a key."""
        with self._changed:
            number = self._rounds[key, rank]
            self._rounds[key, rank] += 1
            laid = self._laid.setdefault((key, number), {})
            laid[rank] = value
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: len(laid) == size, _SECONDS), (
                f"rank {rank} waits for {size} ranks and only {sorted(laid)} came to {key}"
            )
            return laid


class SimulatedRanks:
    """Runs a function in every rank of a group."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ranks: Sequence[int]) -> None:
        self.ranks = tuple(ranks)
        self._own = threading.local()
        self._exchange = _Exchange()
        monkeypatch.setattr(cluster, "needed", lambda *_: self._own.cluster)
        monkeypatch.setattr(world, "_current", _OfThisThread(self._own))
        for name in ("GatherV2", "ReduceV2", "BcastSendV2", "BcastRecvV2"):
            monkeypatch.setattr(tf.raw_ops, f"Collective{name}", getattr(self, f"_{name}"))

    def __call__(self, work: Callable[[int], Any]) -> dict[int, Any]:
        """What `work(rank)` gives in each rank; an exception in its place if it raises one."""
        found: dict[int, Any] = {}

        def run(rank: int) -> None:
            self._own.cluster = SimpleNamespace(rank=rank, host="/device:CPU:0")
            self._own.world = World(
                config=Config(partitions=len(self.ranks)),
                devices=("/device:CPU:0",) * len(self.ranks),
                rank=rank,
                size=len(self.ranks),
                mp_group=self.ranks,
                dp_group=self.ranks,
            )
            try:
                found[rank] = work(rank)
            except Exception as error:
                found[rank] = error

        threads = [threading.Thread(target=run, args=[r], daemon=True) for r in self.ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * _SECONDS)
        return {rank: found[rank] for rank in self.ranks}

    def _all(self, given: dict[str, Any], value: Any) -> dict[int, Any]:
        key = tuple(int(given[name]) for name in ("group_key", "instance_key"))
        return self._exchange.of(key, int(given["group_size"]), self._own.cluster.rank, value)

    def _GatherV2(self, input: Any, **given: Any) -> Any:
        laid = self._all(given, input.numpy())
        return tf.constant(np.concatenate([laid[rank] for rank in by_name(list(laid))]))

    def _ReduceV2(self, input: Any, **given: Any) -> Any:
        assert given["merge_op"] == "Add"
        laid = self._all(given, input.numpy())
        return tf.constant(sum(laid[rank] for rank in by_name(list(laid))))

    def _BcastSendV2(self, input: Any, **given: Any) -> Any:
        self._all(given, input.numpy())
        return input

    def _BcastRecvV2(self, **given: Any) -> Any:
        (sent,) = [value for value in self._all(given, None).values() if value is not None]
        return tf.constant(sent)


class _OfThisThread:
    """The world of the rank that asks."""

    def __init__(self, own: threading.local) -> None:
        self._own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own.world, name)
