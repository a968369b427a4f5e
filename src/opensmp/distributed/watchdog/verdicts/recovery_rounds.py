"""Protocol by which rank 0 synchronizes all ranks after an error in one of them.

A round begins when a rank reports that a call has failed, and has three phases:

1. Halt: rank 0 tells all ranks the cause. Their pending operations are interrupted, so that each of
them leaves its call with the same error.
2. Settle: a rank that reaches its next call reports that, and waits. Once all ranks have done so,
after leaving the same call, each resets its communication.
3. Go: when all have done that, they continue.

This module uses neither processes nor threads: it maps messages to messages for all ranks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from opensmp.distributed.channel.channel import Message
from opensmp.distributed.watchdog.rank_error import RankError

_CAUSE_SECONDS = 1.5  # to wait for the cause after a consequence


class Reaction(NamedTuple):
    """The reaction to a message: messages for all ranks, or the rank at fault and what happened."""

    tell: tuple[Message, ...] = ()
    lost: tuple[int, str] | None = None


class Rounds:
    """The recovery rounds of a run, as rank 0 sees them."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._generation = 0
        self._begin()

    def _begin(self) -> None:
        self._cause: Message | None = None
        self._consequence: tuple[float, Message] | None = None
        self._came: dict[int, list[float]] = {}
        self._ready: set[int] = set()

    def take(self, rank: int, message: Message, now: float) -> Reaction:
        """Handles a message."""
        if message["generation"] != self._generation:
            return Reaction()
        if message["kind"] == "fault":
            return self._fault(message, now)
        if message["kind"] == "settle":
            return self._settle(rank, message["position"])
        self._ready.add(rank)
        if len(self._ready) < self._size:
            return Reaction()
        told = self._message("go")
        self._generation += 1
        self._begin()
        return Reaction((told,))

    def due(self, now: float) -> Reaction:
        """The reaction to the passing of time."""
        known = self._consequence
        if self._cause is None and known is not None and now - known[0] > _CAUSE_SECONDS:
            return self._halt(known[1])
        return Reaction()

    def _fault(self, message: Message, now: float) -> Reaction:
        if self._cause is not None:
            return Reaction()
        if not message["consequence"]:
            return self._halt(message["error"])
        if self._consequence is None:
            self._consequence = (now, message["error"])
        return Reaction()

    def _halt(self, error: Message) -> Reaction:
        self._cause = error
        return Reaction((self._message("halt", error=error),))

    def _settle(self, rank: int, position: list[float]) -> Reaction:
        self._came[rank] = position
        if len(self._came) < self._size:
            return Reaction()
        if len({tuple(each) for each in self._came.values()}) == 1:
            return Reaction((self._message("renew"),))
        return Reaction(lost=self._apart())

    def _apart(self) -> tuple[int, str]:
        cause = RankError(**self._cause) if self._cause else RankError(0, ["an error"], "")
        failed = cause.rank
        others = [r for r in sorted(self._came) if self._came[r] != self._came[failed]]
        return failed, (
            f"{cause}\nThe program caught this error, but the ranks "
            "cannot go on together: "
            f"rank{'s' * (len(others) != 1)} {', '.join(map(str, others))} had already left the "
            f"call that failed in rank {failed}, so that one would train on other data than the "
            "other. Start all ranks again, from the last checkpoint."
        )

    def _message(self, kind: str, **values: Any) -> Message:
        return {"kind": kind, "generation": self._generation, **values}
