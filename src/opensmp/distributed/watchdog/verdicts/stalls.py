"""Measures for how long all ranks have been in some call without any of them computing.

Inside a call that all ranks have entered, such as a step, `deadlock.py` in this folder cannot tell
computing from waiting for a message that never comes. But if no rank computes for
minutes, each waits for another. The time restarts when any rank computes, is swapped in, enters or
leaves a call, or is in none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from opensmp.distributed.watchdog.call_log import FINISHED, Report
from opensmp.distributed.watchdog.verdicts.deadlock import listed

DEFAULT_SECONDS = 600.0
"""Default limit, the usual timeout of collective operations in other libraries."""

# Ranks that wait in a step use 0.3 to 0.7 % of a core, in TensorFlow's threads and in those that
# poll for tensors, and up to 1.5 % in the first seconds (measured).
_COMPUTING = 0.02  # of a core
_NOISE_SECONDS = 0.02  # CPU time that wake-ups may take in a window of any length
_WINDOW_SECONDS = 5.0  # interval over which CPU use is averaged
_SILENT_SECONDS = 10.0  # longest known interval between two reports
_WARNING_SECONDS = 60.0


def computes(used: float, elapsed: float) -> bool:
    """Whether a process does more than wait, by the CPU seconds used in the seconds elapsed."""
    return used >= _COMPUTING * elapsed + _NOISE_SECONDS


class Notice(NamedTuple):
    """A message about an idle run, which either must be ended or is only warned of."""

    text: str
    ends: bool


@dataclass
class _Rank:
    report: Report  # the last one
    heard: float
    sampled: float  # begin of the current window
    worked: float  # CPU seconds at that time
    since: float  # last known activity


class Idleness:
    """CPU use of all ranks, as known to rank 0.

    Args:
        size: Number of ranks.
        limit: Seconds after which an idle run is to be ended; 0: never.
    """

    def __init__(self, size: int, limit: float = DEFAULT_SECONDS) -> None:
        self._size, self._limit = size, limit
        self._warn_after = limit / 2 if 0 < limit <= _WARNING_SECONDS else _WARNING_SECONDS
        self._window = min(_WINDOW_SECONDS, self._warn_after / 4)
        self._ranks: dict[int, _Rank] = {}
        self._warned = False

    def hear(self, rank: int, report: Report, now: float) -> None:
        """Records a report."""
        known = self._ranks.get(rank)
        if (
            known is None
            or (report.state, report.moment, report.faults)
            != (known.report.state, known.report.moment, known.report.faults)
            or now - known.heard > _SILENT_SECONDS
        ):
            self._ranks[rank] = _Rank(report, now, now, report.worked, now)
            return
        known.report, known.heard = report, now
        elapsed = now - known.sampled
        if elapsed >= self._window:
            used = report.worked - known.worked
            if report.calls and computes(used, elapsed):
                known.since = now
            known.sampled, known.worked = now, report.worked

    def notice(self) -> Notice | None:
        """The current warning or end of the run, if any; one warning per idle period."""
        seconds = self._seconds()
        if seconds < self._warn_after:
            self._warned = False
            return None
        ends = 0 < self._limit <= seconds
        if self._warned and not ends:
            return None
        self._warned = True
        what = (
            f"no rank has computed anything for {seconds:.0f} s: "
            f"{_places({rank: known.report for rank, known in self._ranks.items()})}; each seems "
            "to wait for another. Expected: one of them computes, or leaves its call. "
        )
        change = "`opensmp run --idle-seconds N` or OPENSMP_IDLE_SECONDS=N changes that"
        rule = f"The run goes on, as no limit is set; {change}"
        if self._limit:
            rule = f"Runs end after {self._limit:g} s of this; {change}, 0 means never"
        return Notice(f"{what}{rule}.", ends)

    def _seconds(self) -> float:
        """For how long no rank has computed."""
        known = self._ranks.values()
        at_work = [one for one in known if one.report.state != FINISHED]
        if len(known) < self._size or not at_work or not all(o.report.calls for o in at_work):
            return 0.0
        return min(one.sampled for one in known) - max(one.since for one in known)


def _places(reports: Mapping[int, Report]) -> str:
    """Where the ranks are, such as `rank 0 in smp.barrier, ranks 1, 2 in the step train`."""
    ranks: dict[str, list[int]] = {}
    for rank, report in sorted(reports.items()):
        place = f"in {report.calls[0].name}" if report.calls else "at the end of the program"
        ranks.setdefault(place, []).append(rank)
    return ", ".join(f"{listed(those)} {place}" for place, those in ranks.items())
