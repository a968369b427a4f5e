"""For how long no process of a run has computed anything, though all are in some call.

Inside a call that all ranks have entered, such as a step, `opensmp.distributed.watchdog.deadlock`
cannot tell one that computes from one that waits for what nobody sends. But where all compute
nothing, for minutes and at once, each waits for another. A rank that computes, is swapped in,
enters or leaves a call, or is in none, is evidence of the contrary, and counting begins anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from opensmp.distributed.watchdog.call_log import FINISHED, Report
from opensmp.distributed.watchdog.deadlock import listed

DEFAULT_SECONDS = 600.0
"""The limit unless another one is set: the usual one of collective operations elsewhere."""

# Ranks that wait in a step use 0.3 to 0.7 % of a core, in TensorFlow's threads and in those that
# look for tensors, and up to 1.5 % in the first seconds (measured).
_COMPUTING = 0.02  # of a core
_NOISE_SECONDS = 0.02  # of a processor, which waking up may take in a window, however short
_WINDOW_SECONDS = 5.0  # over which use is averaged
_SILENT_SECONDS = 10.0  # between two reports: what happened meanwhile is not known
_WARNING_SECONDS = 60.0


def computes(used: float, elapsed: float) -> bool:
    """Whether a process does more than wait, by its use of processors.

    Args:
        used: Processor seconds.
        elapsed: Seconds in which they were used.
    """
    return used >= _COMPUTING * elapsed + _NOISE_SECONDS


class Notice(NamedTuple):
    """What there is to say about an idle run.

    Attributes:
        text: What happened, in words.
        ends: Whether the run is to be ended; otherwise this is a warning.
    """

    text: str
    ends: bool


@dataclass
class _Rank:
    report: Report  # the last one
    heard: float
    sampled: float  # when the present window began
    worked: float  # and the use until then
    since: float  # when it was last seen to do anything


class Idleness:
    """What rank 0 knows of the use of processors by all ranks.

    Args:
        size: Number of ranks.
        limit: Seconds after which an idle run is to be ended; 0: never.

    Example:
        ```python
        idleness = Idleness(2, limit=600)
        idleness.hear(1, report, time.monotonic())
        idleness.notice()
        ```
    """

    def __init__(self, size: int, limit: float = DEFAULT_SECONDS) -> None:
        self._size, self._limit = size, limit
        self._warn_after = limit / 2 if 0 < limit <= _WARNING_SECONDS else _WARNING_SECONDS
        self._window = min(_WINDOW_SECONDS, self._warn_after / 4)
        self._ranks: dict[int, _Rank] = {}
        self._warned = False

    def hear(self, rank: int, report: Report, now: float) -> None:
        """Takes note of a report.

        Args:
            rank: Whose it is.
            report: The report.
            now: When it was received, by `time.monotonic()`.
        """
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
        """What is to be said now, if anything; a warning comes once in each idle period."""
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
        """For how long all ranks at once have done nothing."""
        known = self._ranks.values()
        at_work = [one for one in known if one.report.state != FINISHED]
        if len(known) < self._size or not at_work or not all(o.report.calls for o in at_work):
            return 0.0
        return min(one.sampled for one in known) - max(one.since for one in known)


def _places(reports: Mapping[int, Report]) -> str:
    """Where the ranks are, as `rank 0 in smp.barrier, ranks 1, 2 in the step train`."""
    ranks: dict[str, list[int]] = {}
    for rank, report in sorted(reports.items()):
        place = f"in {report.calls[0].name}" if report.calls else "at the end of the program"
        ranks.setdefault(place, []).append(rank)
    return ", ".join(f"{listed(those)} {place}" for place, those in ranks.items())
