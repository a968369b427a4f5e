"""What it means that a process is not heard: it is frozen, or the network is interrupted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from opensmp.distributed.channel.link import LinkState
from opensmp.distributed.watchdog.verdicts.deadlock import listed

_SURELY_SECONDS = 2.0


class Place(NamedTuple):
    """A process and its machine."""

    rank: int
    machine: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.machine}" if self.machine else f"rank {self.rank}"


def frozen(seconds: float, link: LinkState | None) -> str:
    """What has happened to a process that does not answer, though the network works."""
    text = f"it is frozen: it has given no sign of life for {seconds:.0f} s"
    return text if link is None else f"{text}, while its machine acknowledges what it is sent"


def interrupted(
    here: Place, there: Place, seconds: float, link: LinkState, others: Sequence[int]
) -> str:
    """Describes a network between two processes that is interrupted.

    Args:
        here: This process.
        there: The one that is not heard.
        seconds: Time since its last message.
        link: The state of the connection.
        others: Further ranks that are not heard either.
    """
    begin, end = f"rank {here.rank}", f"rank {there.rank}"
    hears = f"{begin} has had no message of {end} for {seconds:.0f} s"
    # Packets came long after the last message: the other side sends it again and again.
    one_way = link.is_mute and link.silent_seconds + _SURELY_SECONDS < seconds
    if one_way:
        who = f"are connected in one direction only, from {end} to {begin}"
        hears += f"; packets of {end} arrive, but none acknowledges what {begin} sends to it"
        down = ""
    else:
        who = "cannot hear each other"
        hears += (
            f", and no packet of it for {link.silent_seconds:.0f} s; nothing that {begin} has sent "
            "since then was acknowledged"
        )
        down = f", or {there.machine or 'the machine of ' + end} is down"
    more = f" {listed(others).capitalize()} cannot be heard either." if others else ""
    is_known = here.machine and there.machine
    where = f"between {here.machine} and {there.machine}" if is_known else "between them"
    return f"{here} and {there} {who}: {hears}.{more} The network {where} is interrupted{down}"
