"""Meets the launchers of the machines that are left, before a run of several is started again.

The launcher of machine 0 listens where rank 0 will; those of the others tell it that they are
there. It numbers the machines that have come, and so their ranks, anew. Without machine 0 there is
no run: the others know no other place to meet.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from typing import NamedTuple

from opensmp.cli.running.output import say
from opensmp.distributed.channel.channel import Channel, Message
from opensmp.distributed.channel.handshake import (
    Guest,
    HandshakeServer,
    Secret,
    StrangerError,
    has,
    introduce,
)
from opensmp.distributed.launch.environment import parse_address
from opensmp.distributed.launch.meeting.rendezvous import reserve_port
from opensmp.errors import LaunchError

WAIT_SECONDS = 30.0
"""Default time that a machine has to come: its ranks may notice later that others are gone."""

_TURN_SECONDS, _PAUSE_SECONDS, _HANDSHAKE_SECONDS = 0.2, 0.2, 5.0
_LATE_SECONDS = 15.0  # how much later than the others machine 0 may begin to listen


class Group(NamedTuple):
    """A machine's place in the next run, and how often the run has been restarted then."""

    first_rank: int
    size: int
    restart: int


class Gathering(NamedTuple):
    """What the launchers must know to meet.

    Attributes:
        node_rank: Number of this machine, from 0.
        nodes: Number of machines of the run that has failed.
        least: Minimum number of machines.
        processes: Number of ranks on each machine.
        meeting: Where machine 0 listens, `host:port`.
        secret: Secret of the run.
        seconds: Time that a machine has to come.
        fits: Whether so many ranks make up whole replicas.
    """

    node_rank: int
    nodes: int
    least: int
    processes: int
    meeting: str
    secret: str
    seconds: float
    fits: Callable[[int], bool]

    @property
    def key(self) -> Secret:
        """What launchers show each other; ranks show another one."""
        return Secret(f"{self.secret}-launchers", True)


def regroup(gathering: Gathering, restart: int) -> Group | None:
    """The place of this machine in the next run; None, after a message, if there is none.

    `restart` is the number of that run; machine 0 decides.
    """
    try:
        if gathering.node_rank == 0:
            return _Host(gathering, restart).gather()
        return _visit(gathering)
    except (LaunchError, OSError) as error:
        say(f"no restart: {error}")
        return None


class _Host:
    """The launcher of machine 0."""

    def __init__(self, gathering: Gathering, restart: int) -> None:
        self._gathering, self._restart = gathering, restart
        self._there: dict[int, Channel] = {}

    def gather(self) -> Group:
        here = self._gathering
        _, port = parse_address(here.meeting)
        listener, _ = reserve_port("", port)
        end = time.monotonic() + here.seconds
        with contextlib.closing(listener):
            listener.listen(128)
            with contextlib.closing(HandshakeServer(listener, here.key)) as reception:
                # All that took part are waited for; more do not come.
                while len(self._there) < here.nodes - 1 and time.monotonic() < end:
                    for guest in reception.wait(_TURN_SECONDS):
                        self._take(guest)
        nodes = [0, *sorted(self._there)]
        count = self._count(len(nodes))
        size = count * here.processes
        for position, node in enumerate(nodes[1:], 1):
            place: Message = {"kind": "go", "first": position * here.processes}
            place |= {"size": size, "restart": self._restart}
            if position >= count:
                place = _refusal(f"{count} machines make up whole replicas without this one")
            self._send(node, place)
        said = "machine" if count == 1 else "machines"
        say(f"restart {self._restart}: {count} {said} of {here.nodes}, {size} ranks")
        return Group(0, size, self._restart)

    def _take(self, guest: Guest) -> None:
        here, hello = self._gathering, guest.hello
        if not has(hello, node=int, processes=int) or hello["node"] < 1:
            guest.channel.close()
            return
        node = hello["node"]
        if hello["processes"] != here.processes:
            fault = (
                f"machine {node} has -n {hello['processes']}, machine 0 has -n {here.processes}; "
                "expected the same on all machines"
            )
            self._there[node] = guest.channel
            self._refuse_all(fault)
        if node in self._there:
            self._there[node].close()  # its launcher has come anew
        self._there[node] = guest.channel

    def _count(self, there: int) -> int:
        """Number of machines of the next run."""
        here = self._gathering
        for count in range(there, here.least - 1, -1):
            if here.fits(count * here.processes):
                return count
        self._refuse_all(
            f"{there} of {here.nodes} machines are left after {here.seconds:g} s"
            + (
                f", fewer than --min-nodes {here.least}"
                if there < here.least
                else f", and no number from --min-nodes {here.least} on makes up whole replicas"
            )
        )
        raise AssertionError

    def _send(self, node: int, message: Message) -> None:
        with contextlib.closing(self._there[node]) as channel, contextlib.suppress(OSError):
            channel.send(message)

    def _refuse_all(self, text: str) -> None:
        for node in self._there:
            self._send(node, _refusal(text))
        raise LaunchError(text)


def _refusal(text: str) -> Message:
    return {"kind": "refused", "text": text}


def _visit(here: Gathering) -> Group:
    """The launchers of other machines: asks machine 0."""
    place = parse_address(here.meeting)
    end = time.monotonic() + here.seconds + _LATE_SECONDS
    problem: OSError | None = None
    while time.monotonic() < end:
        try:
            reply = _ask(here, place, end)
        except StrangerError as error:
            raise LaunchError(
                f"the launcher of machine 0 at {here.meeting} does not let this one in: {error}"
            ) from None
        except OSError as error:
            problem = error
            time.sleep(_PAUSE_SECONDS)
            continue
        if reply.get("kind") == "refused" and has(reply, text=str):
            raise LaunchError(reply["text"])
        if has(reply, first=int, size=int, restart=int):
            return Group(reply["first"], reply["size"], reply["restart"])
    raise LaunchError(
        f"the launcher of machine 0 at {here.meeting} has not answered for "
        f"{here.seconds + _LATE_SECONDS:g} s ({problem}). Expected: machine 0 stays, since all "
        "others meet there; start the run again on the machines that are left"
    )


def _ask(here: Gathering, place: tuple[str, int], end: float) -> Message:
    connection = socket.create_connection(place, 2.0)
    channel = introduce(connection, here.key, here.node_rank, here.nodes, _HANDSHAKE_SECONDS)
    with contextlib.closing(channel):
        channel.send({"node": here.node_rank, "processes": here.processes})
        return channel.receive(max(_HANDSHAKE_SECONDS, end - time.monotonic()))
