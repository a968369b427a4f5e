"""Detects processes that can never continue because they wait for each other.

Nothing here measures time: a process may compute, load data or write a checkpoint for any time. A
run is lost only if one of these is certain:

- *mismatch*: two processes have entered different calls as the same call number of a group;
- *stuck*: a process waits for one whose program has ended, or that waits for it in turn, directly
  or through others. Running processes may still come, and so may those that wait only for such
  processes; all others are stuck.

Ranks that wait in the same call are considered together, so that the time grows with the number of
ranks and not with its square.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from opensmp.distributed.watchdog.call_log import FINISHED, RUNNING, Group, Report, Wait

_MOST_SINGLE = 16  # ranks that are listed one by one in a message


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


class _Call(NamedTuple):
    """A call that some ranks are in."""

    group: Group
    number: int


def find_mismatch(reports: Mapping[int, Report]) -> Finding | None:
    """Two ranks that disagree about what a call is; needs no confirmation."""
    names: dict[_Call, set[str]] = {}
    for report in reports.values():
        for wait in report.calls:
            names.setdefault(_Call(wait.group, wait.number), set()).add(wait.name)
    for call, known in names.items():
        known.update(filter(None, (_name_of(reports.get(r), call) for r in call.group.ranks)))
    if all(len(known) == 1 for known in names.values()):
        return None
    for rank, report in sorted(reports.items()):
        for wait in report.calls:
            call = _Call(wait.group, wait.number)
            if len(names[call]) == 1:
                continue
            for other in wait.group.ranks:
                name = _name_of(reports.get(other), call)
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
    waiting = {
        rank: _Call(report.wait.group, report.wait.number)
        for rank, report in reports.items()
        if report.state not in (RUNNING, FINISHED) and report.wait is not None
    }
    absent = {call: _absent(call, reports) for call in dict.fromkeys(waiting.values())}
    stuck = sorted(_stuck(waiting, absent, reports))
    if not stuck:
        return None
    blocked = set(stuck)
    ended = {rank for rank, report in reports.items() if report.state == FINISHED}
    going = reports.keys() - blocked - ended
    # For each call, who is waited for, and in which words.
    lost = {call: [rank for rank in ranks if rank in ended] for call, ranks in absent.items()}
    others = {
        call: lost[call] or [rank for rank in ranks if rank not in going]
        for call, ranks in absent.items()
    }
    ended_early: set[int] = set()
    computing = []
    waited_for: Counter[int] = Counter()
    for call, ranks in Counter(waiting[rank] for rank in stuck).items():
        ended_early.update(lost[call])
        for other in others[call]:
            waited_for[other] += ranks
    together: dict[tuple[_Call, str], list[int]] = {}
    for rank in stuck:
        wait = reports[rank].wait
        assert wait is not None
        if wait.computes:
            computing.append(rank)
        together.setdefault((waiting[rank], wait.name), []).append(rank)
    lines = [
        (ranks, f"in {name} for {listed(others[call])}") for (call, name), ranks in together.items()
    ]
    if len(stuck) <= _MOST_SINGLE:
        lines = sorted(([rank], line) for ranks, line in lines for rank in ranks)
    said = [f"{listed(ranks)} {'waits' if len(ranks) == 1 else 'wait'} {s}" for ranks, s in lines]
    if len(ended_early) <= _MOST_SINGLE:
        said += [f"the program of rank {other} has ended" for other in sorted(ended_early)]
    else:
        said.append(f"the programs of {listed(sorted(ended_early))} have ended")
    involved = tuple((rank, reports[rank].moment) for rank in sorted(blocked | ended_early))
    # The rank that most others wait for is likely the one out of step.
    named = max(ended_early or stuck, key=lambda rank: (waited_for[rank], -rank))
    return Finding(named, "; ".join(said), involved, tuple(computing))


def _stuck(
    waiting: Mapping[int, _Call],
    absent: Mapping[_Call, Sequence[int]],
    reports: Mapping[int, Report],
) -> Iterable[int]:
    """The waiting ranks that can never continue."""
    # Least fixed point: a call is complete once no rank is absent that is not going; then the ranks
    # that wait in it are going, too. A rank that nobody has heard of counts as going.
    waits_in: dict[_Call, list[int]] = {}
    for rank, call in waiting.items():
        waits_in.setdefault(call, []).append(rank)
    needed_by: dict[int, list[_Call]] = {}
    missing: dict[_Call, int] = {}
    for call, ranks in absent.items():
        needed = [r for r in ranks if r in reports and reports[r].state != RUNNING]
        missing[call] = len(needed)
        for rank in needed:
            needed_by.setdefault(rank, []).append(call)
    complete = [call for call, number in missing.items() if not number]
    left = set(waiting)
    while complete:
        for rank in waits_in[complete.pop()]:
            left.remove(rank)
            for call in needed_by.get(rank, ()):
                missing[call] -= 1
                if not missing[call]:
                    complete.append(call)
    return left


def _absent(call: _Call, reports: Mapping[int, Report]) -> list[int]:
    """The ranks that have not yet entered a call, ascending."""
    return [rank for rank in call.group.ranks if _count(reports.get(rank), call) < call.number]


def _count(report: Report | None, call: _Call) -> int:
    done = report.entered.get(call.group) if report else None
    return done.number if done else 0


def _name_of(report: Report | None, call: _Call) -> str | None:
    """A rank's name of the call that another one waits in; None if it has not reached it."""
    done = report.entered.get(call.group) if report else None
    if done is None or done.number < call.number:
        return None
    back = done.number - call.number
    return done.names[-1 - back] if back < len(done.names) else None


def _of(wait: Wait) -> str:
    return listed(list(wait.group.ranks), "ranks")


def listed(ranks: Sequence[int], noun: str = "") -> str:
    """Ranks in words, such as `ranks 0, 1`; many of them as `ranks 0 to 511, 513 to 1023`."""
    noun = noun or f"rank{'s' * (len(ranks) != 1)}"
    if len(ranks) <= _MOST_SINGLE:
        return f"{noun} {', '.join(map(str, ranks))}"
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    texts = [str(first) if first == last else f"{first} to {last}" for first, last in runs]
    shown = ", ".join(texts[:_MOST_SINGLE])
    left = sum(last - first + 1 for first, last in runs[_MOST_SINGLE:])
    return f"{noun} {shown} and {left} more" if left else f"{noun} {shown}"
