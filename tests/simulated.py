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
        self._made: dict[Any, Any] = {}

    def of(
        self, key: Any, size: int, rank: int, value: Any, combine: Callable[[dict[int, Any]], Any]
    ) -> Any:
        """What is made, once, of all that the ranks have laid down for the same use of a key."""
        with self._changed:
            number = self._rounds[key, rank]
            self._rounds[key, rank] += 1
            laid = self._laid.setdefault((key, number), {})
            laid[rank] = value
            if len(laid) == size:
                self._made[key, number] = combine(laid)
                self._changed.notify_all()
            assert self._changed.wait_for(lambda: (key, number) in self._made, _SECONDS), (
                f"rank {rank} waits for {size} ranks and only {sorted(laid)} came to {key}"
            )
            return self._made[key, number]


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

    def _all(self, given: dict[str, Any], value: Any, combine: Callable[..., Any]) -> Any:
        key = tuple(int(given[name]) for name in ("group_key", "instance_key"))
        rank = self._own.cluster.rank
        return self._exchange.of(key, int(given["group_size"]), rank, value, combine)

    def _GatherV2(self, input: Any, **given: Any) -> Any:
        def together(laid: dict[int, Any]) -> Any:
            return tf.constant(np.concatenate([laid[rank] for rank in by_name(list(laid))]))

        return self._all(given, input.numpy(), together)

    def _ReduceV2(self, input: Any, **given: Any) -> Any:
        assert given["merge_op"] == "Add"

        def total(laid: dict[int, Any]) -> Any:
            return tf.constant(sum(laid[rank] for rank in by_name(list(laid))))

        return self._all(given, input.numpy(), total)

    def _BcastSendV2(self, input: Any, **given: Any) -> Any:
        self._all(given, input.numpy(), _sent)
        return input

    def _BcastRecvV2(self, **given: Any) -> Any:
        return self._all(given, None, _sent)


def _sent(laid: dict[int, Any]) -> Any:
    """The value of the only rank that sends."""
    (sent,) = [value for value in laid.values() if value is not None]
    return tf.constant(sent)


class _OfThisThread:
    """The world of the rank that asks."""

    def __init__(self, own: threading.local) -> None:
        self._own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own.world, name)
