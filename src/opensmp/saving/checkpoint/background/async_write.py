"""A checkpoint that is being written while training goes on."""

from __future__ import annotations

import atexit
import itertools
import json
import threading
from collections.abc import Callable, Sequence

from opensmp import _private
from opensmp.errors import CheckpointError
from opensmp.saving.collective_errors import Outcome, first_error, outcome_of

_serial = itertools.count()  # the same in all processes, for all of them start every write
_latest: dict[str, Flight] = {}  # the last one to each place


class Flight:
    """One checkpoint on its way to the disk, on a thread of its own.

    The thread waits for nothing that the main threads of the processes do. Rank 0 hears from
    the others when their parts are written, and puts the whole together. A process that ends
    normally ends when its thread has.

    Args:
        path: The path that the checkpoint will have.
        rank: This process's rank.
        size: Number of processes.
        part: Writes the part of this process.
        whole: Makes the whole of the parts, given their outcomes; gives them back, with how it
            went with the whole. Called by rank 0.
        place: Where the checkpoint is made. Only one may be made there at a time.
    """

    def __init__(
        self,
        path: str,
        rank: int,
        size: int,
        part: Callable[[], Outcome],
        whole: Callable[[Sequence[Outcome]], list[Outcome]],
        place: str = "",
    ) -> None:
        self.path = path
        self.size = size
        self._outcomes: list[Outcome] = []
        self._key = f"opensmp/checkpoints/{next(_serial)}"
        atexit.register(self._report)
        # Its arguments are forgotten when it ends, and with them the values that it wrote.
        self._thread = threading.Thread(
            target=self._run, args=(rank, size, part, whole), name="opensmp-checkpoint"
        )
        self._thread.start()
        if place:
            _latest[place] = self

    def settled(self) -> None:
        """Waits for the end of it here, without asking how it went."""
        self._thread.join()

    def outcomes(self) -> list[Outcome]:
        """Waits for the end of it here; the outcomes of all processes on rank 0, else its own."""
        self._thread.join()
        atexit.unregister(self._report)
        return self._outcomes

    def _run(
        self,
        rank: int,
        size: int,
        part: Callable[[], Outcome],
        whole: Callable[[Sequence[Outcome]], list[Outcome]],
    ) -> None:
        try:
            outcomes = [part()]
            if rank:
                _private.post(f"{self._key}/{rank}", json.dumps(outcomes[0]))
            else:
                for other in range(1, size):
                    outcomes.append(Outcome(*json.loads(_private.fetch(f"{self._key}/{other}"))))
                outcomes = whole(outcomes)
            self._outcomes = outcomes
        except Exception as error:
            self._outcomes = [outcome_of(error)]

    def _report(self) -> None:
        """Tells of an error that nobody has asked for, when the program ends."""
        error = first_error(self.outcomes())
        if error is not None:
            raise CheckpointError(not_saved(self.path, error))


def settle(place: str) -> None:
    """Waits for the checkpoint that another manager of this process makes at a place."""
    flight = _latest.pop(place, None)
    if flight is not None:
        flight.settled()


def not_saved(path: str, error: str) -> str:
    """The message of a checkpoint that could not be written."""
    return (
        f"The checkpoint was not saved{f' to {path}' if path else ''}, earlier ones are as they "
        f"were. {error}"
    )
