"""Rank 0's judgement of the reports of all ranks: whether the run can go on.

Hearing a report takes the same time for any number of ranks, and a judgement, once per heartbeat,
grows with their number. The caller passes the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from opensmp.distributed.watchdog.call_log import FINISHED, Report
from opensmp.distributed.watchdog.verdicts import deadlock
from opensmp.distributed.watchdog.verdicts.stalls import Idleness, Notice, computes

_BEAT_SECONDS, _LONG_BEAT_SECONDS = 0.5, 1.0
_MANY = 256
_CONFIRM_SECONDS = 3.0  # without a change, before processes count as stuck


def beat_seconds(size: int) -> float:
    """Interval of heartbeats and of judgements in a run of so many ranks."""
    return _BEAT_SECONDS if size < _MANY else _LONG_BEAT_SECONDS


class Verdict(NamedTuple):
    """Why a run has failed: the rank that did, and what happened to it; None if no rank did."""

    rank: int | None
    text: str

    def __str__(self) -> str:
        return self.text if self.rank is None else f"rank {self.rank} failed: {self.text}"


@dataclass
class _Suspicion:
    """Ranks that seem to be stuck.

    Attributes:
        since: When the suspicion arose.
        finding: Its reason.
        worked: CPU seconds at that time of the ranks that may be computing.
    """

    since: float
    finding: deadlock.Finding
    worked: Mapping[int, float]


class Judge:
    """The reports of all ranks, and what follows from them.

    Args:
        size: Number of ranks.
        idle_seconds: How long all ranks may be in some call without any of them computing; 0: no
            limit.
    """

    def __init__(self, size: int, idle_seconds: float) -> None:
        self._size, self._beat_seconds = size, beat_seconds(size)
        self._reports: dict[int, Report] = {}
        self._heard: dict[int, float] = {}
        self._finished: set[int] = set()
        self._idleness = Idleness(size, idle_seconds)
        self._has_changed = True  # since the last judgement
        self._stuck: deadlock.Finding | None = None
        self._suspicion: _Suspicion | None = None

    def hear(self, rank: int, report: Report, now: float) -> None:
        """Records a report."""
        known = self._reports.get(rank)
        if known is None or (known.state, known.moment) != (report.state, report.moment):
            self._has_changed = True
        self._reports[rank], self._heard[rank] = report, now
        if report.state == FINISHED:
            self._finished.add(rank)
        self._idleness.hear(rank, report, now)

    @property
    def all_finished(self) -> bool:
        """Whether the programs of all ranks have ended without an error."""
        return len(self._finished) == self._size

    def judge(self, now: float) -> Verdict | Notice | None:
        """Why the run can never continue, or a notice about idleness, if any."""
        if self._has_changed:
            mismatch = deadlock.find_mismatch(self._reports)
            if mismatch is not None:
                return _verdict(mismatch)
            self._stuck = deadlock.find_stuck(self._reports)
            self._has_changed = False
        if self._is_confirmed(self._stuck, now):
            assert self._stuck is not None
            return _verdict(self._stuck)
        return self._idleness.notice()

    def _is_confirmed(self, finding: deadlock.Finding | None, now: float) -> bool:
        """Whether newer reports of all ranks agree that processes are stuck."""
        if finding is None:
            self._suspicion = None
            return False
        worked = {rank: self._reports[rank].worked for rank in finding.computing}
        known = self._suspicion
        if known is None or known.finding.moments != finding.moments:
            self._suspicion = _Suspicion(now, finding, worked)
            return False
        again = all(
            rank == 0 or self._heard[rank] > known.since + self._beat_seconds
            for rank, _ in finding.moments
        )
        if not again or now - known.since <= _CONFIRM_SECONDS:
            return False
        if any(computes(used - known.worked[r], now - known.since) for r, used in worked.items()):
            self._suspicion = _Suspicion(now, finding, worked)
            return False
        return True


def _verdict(finding: deadlock.Finding) -> Verdict:
    return Verdict(finding.rank, f"the programs do not match: {finding.text}")
