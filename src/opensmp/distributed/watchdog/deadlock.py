"""Detects processes that can never continue because they wait for each other.

Nothing here measures time: a process may compute, load data or write a checkpoint for any time. A
run is lost only if one of these is certain:

- *mismatch*: two processes have entered different calls as the same call number of a group;
- *stuck*: a process waits for one whose program has ended, or that waits for it in turn, directly
  or through others. Running processes may still come, and so may those that wait only for such
  processes; all others are stuck.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from opensmp.distributed.watchdog.call_log import FINISHED, RUNNING, Report, Wait


class Finding(NamedTuple):
    """A reason why a run can never continue.

    Attributes:
        rank: The rank to report: the one that is most likely out of step.
        text: Description.
        moments: The moment of every rank that the finding depends on. It is confirmed if they are
            unchanged in newer reports of all of them: reports of different times may together
            describe a state that never existed.
        computing: Ranks of the finding that may still be computing; see `Wait.computes`.
    """

    rank: int
    text: str
    moments: tuple[tuple[int, int], ...]
    computing: tuple[int, ...] = ()


def find_mismatch(reports: Mapping[int, Report]) -> Finding | None:
    """Two ranks that disagree about what a call is; needs no confirmation."""
    for rank, report in sorted(reports.items()):
        for wait in report.calls:
            for other in wait.group.ranks:
                name = _name_of(reports.get(other), wait)
                if name is not None and name != wait.name:
                    text = (
                        f"rank {rank} is in {wait.name}, rank {other} came to {name} instead, each "
                        f"as call {wait.number} of {_of(wait)}; every rank must make the same "
                        "calls in the same order"
                    )
                    return Finding(other, text, ())
    return None


def find_stuck(reports: Mapping[int, Report]) -> Finding | None:
    """Ranks that wait for what can never happen; to be confirmed, see `Finding.moments`."""
    going = {rank for rank, report in reports.items() if report.state == RUNNING}
    ended = {rank for rank, report in reports.items() if report.state == FINISHED}
    waiting = {
        rank: _absent(report.wait, reports)
        for rank, report in reports.items()
        if rank not in going | ended and report.wait is not None
    }
    # Least fixed point: a rank that waits only for ranks that can continue can continue, too.
    while True:
        more = {
            rank
            for rank, absent in waiting.items()
            if rank not in going and all(other in going or other not in reports for other in absent)
        }
        if not more:
            break
        going |= more
    stuck = sorted(rank for rank in waiting if rank not in going)
    if not stuck:
        return None
    lines = []
    ended_early: set[int] = set()
    computing = []
    waited_for: Counter[int] = Counter()
    for rank in stuck:
        wait = reports[rank].wait
        assert wait is not None
        if wait.computes:
            computing.append(rank)
        lost = sorted(other for other in waiting[rank] if other in ended)
        others = lost or sorted(other for other in waiting[rank] if other not in going)
        ended_early |= set(lost)
        waited_for.update(others)
        lines.append(f"rank {rank} waits in {wait.name} for {listed(others)}")
    for other in sorted(ended_early):
        lines.append(f"the program of rank {other} has ended")
    involved = tuple((rank, reports[rank].moment) for rank in sorted({*stuck, *ended_early}))
    # The rank that most others wait for is likely the one out of step.
    named = max(ended_early or stuck, key=lambda rank: (waited_for[rank], -rank))
    return Finding(named, "; ".join(lines), involved, tuple(computing))


def _absent(wait: Wait | None, reports: Mapping[int, Report]) -> list[int]:
    """The ranks that have not yet entered a call."""
    assert wait is not None
    return [rank for rank in wait.group.ranks if _count(reports.get(rank), wait) < wait.number]


def _count(report: Report | None, wait: Wait) -> int:
    done = report.entered.get(wait.group) if report else None
    return done.number if done else 0


def _name_of(report: Report | None, wait: Wait) -> str | None:
    """A rank's name of the call that another one waits in; None if it has not reached it."""
    done = report.entered.get(wait.group) if report else None
    if done is None or done.number < wait.number:
        return None
    back = done.number - wait.number
    return done.names[-1 - back] if back < len(done.names) else None


def _of(wait: Wait) -> str:
    return f"ranks {', '.join(map(str, wait.group.ranks))}"


def listed(ranks: list[int]) -> str:
    """Ranks in words, such as `ranks 0, 1`."""
    return f"rank{'s' * (len(ranks) != 1)} {', '.join(map(str, ranks))}"
