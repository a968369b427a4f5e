"""What the heartbeats of a process say: only what has changed since the last one.

A group of ranks is described once per connection, and has a number from then on. A heartbeat in
which nothing has changed is therefore short and quickly read, for any number of ranks and groups.
"""

from __future__ import annotations

from typing import Any

from opensmp.distributed.channel.channel import Message
from opensmp.distributed.watchdog.call_log import Entered, Group, Report, Wait


class Sender:
    """Writes the heartbeats of this process for one connection."""

    def __init__(self) -> None:
        self.start_anew()

    def start_anew(self) -> None:
        """Makes the next heartbeat a complete one, because the last one may not have been sent."""
        self._numbers: dict[Group, int] = {}
        self._counts: dict[Group, int] = {}
        self._told: tuple[str, int] | None = None

    def heartbeat(self, report: Report) -> Message:
        """The next heartbeat, a value that JSON can represent."""
        load = [report.worked, report.faults, report.steps]
        if self._told == (report.state, report.moment):
            return {"kind": "alive", "load": load}
        groups: list[Any] = []
        entered = [
            [self._number(group, groups), done.number, *done.names]
            for group, done in report.entered.items()
            if self._counts.get(group) != done.number
        ]
        gone = [
            self._numbers[group] for group in self._counts if group not in report.entered
        ]  # counting has begun anew
        message = {
            "kind": "alive",
            "load": load,
            "anew": self._told is None,
            "state": report.state,
            "moment": report.moment,
            "wait": report.wait and self._call(report.wait, groups),
            "aside": [self._call(wait, groups) for wait in report.aside],
            "entered": entered,
            "gone": gone,
            "groups": groups,
        }
        self._counts = {group: done.number for group, done in report.entered.items()}
        self._told = report.state, report.moment
        return message

    def _call(self, wait: Wait, groups: list[Any]) -> list[Any]:
        return [self._number(wait.group, groups), wait.number, wait.name, wait.computes]

    def _number(self, group: Group, groups: list[Any]) -> int:
        if group not in self._numbers:
            self._numbers[group] = len(self._numbers)
            groups.append([group.lane, *_packed(group.ranks)])
        return self._numbers[group]


class Receiver:
    """Reads the heartbeats of another process. The time taken depends on what has changed."""

    def __init__(self) -> None:
        self._groups: list[Group] = []
        self._report: Report | None = None

    def report(self, message: Message) -> Report:
        """The state of the process. Its `entered` is that of the earlier reports, brought up."""
        worked, faults, steps = message["load"]
        known = self._report
        if "state" not in message:
            assert known is not None
            state, moment, wait, entered, *_, aside = known
        else:
            if message["anew"]:
                self._groups.clear()
            self._groups += [Group(_unpacked(ranks), lane) for lane, *ranks in message["groups"]]
            entered = known.entered if known is not None and not message["anew"] else {}
            assert isinstance(entered, dict)
            for group in message["gone"]:
                del entered[self._groups[group]]
            for group, number, *names in message["entered"]:
                entered[self._groups[group]] = Entered(number, tuple(names))
            state, moment = message["state"], message["moment"]
            wait = message["wait"] and self._call(*message["wait"])
            aside = tuple(self._call(*call) for call in message["aside"])
        self._report = Report(state, moment, wait, entered, steps, worked, faults, aside)
        return self._report

    def _call(self, group: int, number: int, name: str, computes: bool) -> Wait:
        return Wait(self._groups[group], number, name, computes)


def _packed(ranks: tuple[int, ...]) -> list[Any]:
    """Start, stride and count of evenly spaced ranks, as most groups are; else a list of them."""
    stride = ranks[1] - ranks[0] if len(ranks) > 1 else 1
    regular = (ranks[0], stride, len(ranks))
    return list(regular) if ranks == _unpacked(regular) else [list(ranks)]


def _unpacked(packed: Any) -> tuple[int, ...]:
    if len(packed) == 1:
        return tuple(packed[0])
    start, stride, count = packed
    return tuple(range(start, start + stride * count, stride))
