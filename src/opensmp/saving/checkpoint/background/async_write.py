"""Writes one checkpoint on a background thread while training continues."""

from __future__ import annotations

import atexit
import itertools
import json
import threading
from collections.abc import Callable, Sequence

from opensmp import _private
from opensmp.errors import CheckpointError
from opensmp.saving.collective_errors import RankResult, first_error, result_of_error

_serial = itertools.count()  # equal in all processes, since every write is started by all of them
_latest: dict[str, BackgroundWrite] = {}  # the latest write per staging directory


class BackgroundWrite:
    """One background write of a checkpoint, on its own thread.

    The thread does not wait for the main threads of any process. Rank 0 receives the outcomes of
    the other ranks' shards and assembles the checkpoint. A process that exits normally waits for
    the thread.

    Args:
        path: The final path of the checkpoint.
        rank: This process's rank.
        size: Number of processes.
        part: Writes the shard of this process.
        whole: Assembles the checkpoint from the shards, given their outcomes, and returns these
            with its own result. Called only by rank 0.
        place: The staging directory, for which only one write may run at a time.
    """

    def __init__(
        self,
        path: str,
        rank: int,
        size: int,
        part: Callable[[], RankResult],
        whole: Callable[[Sequence[RankResult]], list[RankResult]],
        place: str = "",
    ) -> None:
        self.path = path
        self.size = size
        self._outcomes: list[RankResult] = []
        self._key = f"opensmp/checkpoints/{next(_serial)}"
        atexit.register(self._report)
        # The thread drops its arguments when it ends, and with them the values that it wrote.
        self._thread = threading.Thread(
            target=self._run, args=(rank, size, part, whole), name="opensmp-checkpoint"
        )
        self._thread.start()
        if place:
            _latest[place] = self

    def settled(self) -> None:
        """Waits for this process's thread, without raising its error."""
        self._thread.join()

    def outcomes(self) -> list[RankResult]:
        """Waits for this process's thread; returns all outcomes on rank 0, else only its own."""
        self._thread.join()
        atexit.unregister(self._report)
        return self._outcomes

    def _run(
        self,
        rank: int,
        size: int,
        part: Callable[[], RankResult],
        whole: Callable[[Sequence[RankResult]], list[RankResult]],
    ) -> None:
        """Writes this process's shard; on rank 0 also collects the outcomes and merges."""
        try:
            outcomes = [part()]
            if rank:
                _private.post(f"{self._key}/{rank}", json.dumps(outcomes[0]))
            else:
                for other in range(1, size):
                    outcomes.append(RankResult(*json.loads(_private.fetch(f"{self._key}/{other}"))))
                outcomes = whole(outcomes)
            self._outcomes = outcomes
        except Exception as error:
            self._outcomes = [result_of_error(error)]

    def _report(self) -> None:
        """At exit, raises an error that no call has raised yet."""
        error = first_error(self.outcomes())
        if error is not None:
            raise CheckpointError(not_saved(self.path, error))


def settle(place: str) -> None:
    """Waits for this process's latest background write to the same staging directory."""
    flight = _latest.pop(place, None)
    if flight is not None:
        flight.settled()


def not_saved(path: str, error: str) -> str:
    """Error message for a checkpoint that could not be written."""
    return (
        f"The checkpoint was not saved{f' to {path}' if path else ''}, earlier ones are as they "
        f"were. {error}"
    )
