"""Where the processes of a run meet and tell each other who and where they are.

Rank 0 listens, everyone else comes to it; when all are there, everyone gets the same table.
The connections stay open: `opensmp.runtime.failures` uses them to notice who is gone. They
form a star around rank 0, which holds `size - 1` of them.
"""

from __future__ import annotations

import contextlib
import secrets
import select
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from opensmp.errors import LaunchError
from opensmp.runtime.channel import Channel, Message
from opensmp.runtime.launched import Launch

_HANDSHAKE_SECONDS = 5.0
_PAUSE_SECONDS = 0.1


@dataclass(frozen=True)
class Peer:
    """One process, as all others know it.

    Attributes:
        rank: Its rank.
        address: `host:port` of its TensorFlow server.
        machine: Name of the machine it runs on, equal for processes of one machine.
        process: Its process id there.
        facts: What it said about itself; compared by `agree`.
    """

    rank: int
    address: str
    machine: str
    process: int
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Meeting:
    """The result of a rendezvous.

    Attributes:
        peers: All processes, by rank.
        channels: Open connections by rank: rank 0 has one to everybody, the others have one,
            to rank 0.
        reservation: A socket that keeps this process's port from everybody else, or None; to
            be kept open as long as the TensorFlow server is not yet there.
    """

    peers: tuple[Peer, ...]
    channels: Mapping[int, Channel]
    reservation: socket.socket | None


def reserve_port(host: str = "", port: int = 0) -> tuple[socket.socket, int]:
    """A free port, or this one, and the socket that keeps it.

    The socket is bound but does not listen, and shares its port (`SO_REUSEPORT`), as
    TensorFlow's server and the listener below do: they can use the port, nobody else gets it.
    """
    # TensorFlow's server binds all interfaces by their IPv6 address where there is one.
    everywhere = not host and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if everywhere else socket.AF_INET
    reservation = socket.socket(family, socket.SOCK_STREAM)
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if everywhere:
        reservation.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    reservation.bind((host, port))
    return reservation, int(reservation.getsockname()[1])


def meet(launch: Launch, machine: str, process: int, facts: Mapping[str, Any]) -> Meeting:
    """Waits for all other processes of the run.

    Args:
        launch: What the launcher says.
        machine: Name of this machine, equal for all processes on it and for no other.
        process: This process's id.
        facts: Values that must be the same in all processes; a process that differs makes
            the run end with an error that names it and the first difference.

    Raises:
        LaunchError: Someone did not come in time, two processes have the same rank, or the
            processes do not agree.

    Example:
        ```python
        meeting = meet(launch, "node7", os.getpid(), {"partitions": 2})
        meeting.peers[1].address  # "10.0.0.8:41233"
        ```
    """
    assert launch.meeting is not None
    reservation: socket.socket | None = None
    if launch.addresses is None:
        reservation, port = reserve_port()
    else:
        port = int(launch.addresses[launch.rank].rsplit(":", 1)[1])
    hello = {
        "kind": "hello",
        "nonce": secrets.token_hex(8),
        "rank": launch.rank,
        "size": launch.size,
        "port": port,
        "machine": machine,
        "process": process,
        "facts": dict(facts),
    }
    try:
        if launch.rank == 0:
            rows, channels = _Host(launch, hello).gather()
        else:
            rows, channels = _visit(launch, hello)
    except BaseException:
        if reservation is not None:
            reservation.close()
        raise
    peers = tuple(Peer(row["rank"], row["address"], row["machine"], row["process"], row["facts"])
                  for row in rows)  # fmt: skip
    return Meeting(peers, channels, reservation)


def disagreement(rows: Mapping[int, Mapping[str, Any]]) -> str | None:
    """The first fact in which a process differs from rank 0, in words; None if all agree.

    Args:
        rows: The facts of each process, by rank.

    Example:
        ```python
        disagreement({0: {"partitions": 2}, 1: {"partitions": 4}})
        # "rank 1 has partitions=4, rank 0 has partitions=2"
        ```
    """
    reference = rows[0]
    for rank, facts in sorted(rows.items()):
        for name in [*reference, *(name for name in facts if name not in reference)]:
            if facts.get(name) != reference.get(name):
                return (
                    f"rank {rank} has {name}={facts.get(name)!r}, rank 0 has "
                    f"{name}={reference.get(name)!r}"
                )
    return None


# -------------------------------------------------------------------------------- rank zero


class _Host:
    """Rank 0: listens until everybody is there."""

    def __init__(self, launch: Launch, hello: Message) -> None:
        self._launch = launch
        self._rows: dict[int, Message] = {0: hello}
        self._channels: dict[int, Channel] = {}

    def gather(self) -> tuple[list[Message], dict[int, Channel]]:
        launch = self._launch
        end = time.monotonic() + launch.join_seconds
        listener = _listen(launch)
        try:
            while len(self._rows) < launch.size:
                if time.monotonic() > end:
                    self._refuse_all(_absent(launch, self._rows.keys()))
                waiting = {channel.fileno(): rank for rank, channel in self._channels.items()}
                ready, _, _ = select.select([listener.fileno(), *waiting], [], [], 0.2)
                for item in ready:
                    if item == listener.fileno():
                        self._admit(listener)
                    else:
                        self._forget(waiting[item])
        finally:
            listener.close()
        difference = disagreement({rank: row["facts"] for rank, row in self._rows.items()})
        if difference is not None:
            self._refuse_all(
                f"The processes do not agree: {difference}. Expected: the same program and the "
                "same configuration in every process."
            )
        rows = [self._rows[rank] for rank in range(launch.size)]
        for row in rows:
            row["address"] = _address(launch, row, self._rows[0]["machine"])
        for rank, channel in self._channels.items():
            channel.send({"kind": "table", "nonce": self._rows[rank]["nonce"], "rows": rows})
        return rows, self._channels

    def _admit(self, listener: socket.socket) -> None:
        connection, address = listener.accept()
        channel = Channel(connection, self._launch.token)
        try:
            row = channel.receive(_HANDSHAKE_SECONDS)
            if row.get("kind") == "absent":
                channel.close()
                self._refuse_all(row["text"])
            rank, size = int(row["rank"]), int(row["size"])
        except (OSError, ValueError, KeyError):
            channel.close()  # a stranger, or one of another run
            return
        if size != self._launch.size or not 0 < rank < size or rank in self._rows:
            fault = (
                f"there are two processes of rank {rank}"
                if size == self._launch.size
                else f"rank {rank} was started as one of {size}, rank 0 as one of "
                f"{self._launch.size}"
            )
            with contextlib.suppress(OSError):
                channel.send({"kind": "refused", "nonce": row.get("nonce"), "text": fault})
            channel.close()
            self._refuse_all(f"The processes do not fit together: {fault}.")
        with contextlib.suppress(OSError):  # if it is gone already, `gather` will notice
            channel.send({"kind": "welcome", "nonce": row["nonce"]})
        row["host"] = address[0].removeprefix("::ffff:")
        self._rows[rank], self._channels[rank] = row, channel

    def _forget(self, rank: int) -> None:
        """Someone left before the others came; started anew, it may come again."""
        self._channels.pop(rank).close()
        del self._rows[rank]

    def _refuse_all(self, text: str) -> None:
        for rank, channel in self._channels.items():
            with contextlib.suppress(OSError):
                channel.send({"kind": "refused", "nonce": self._rows[rank]["nonce"], "text": text})
            channel.close()
        raise LaunchError(text)


def _listen(launch: Launch) -> socket.socket:
    host, first = launch.meeting or ("", 0)
    local = host in ("127.0.0.1", "localhost")
    problem: OSError | None = None
    for port in range(first, first + launch.num_meeting_ports):
        dual = not local and socket.has_dualstack_ipv6()
        listener = socket.socket(socket.AF_INET6 if dual else socket.AF_INET, socket.SOCK_STREAM)
        if dual:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if launch.source == "opensmp run":
            # The launcher holds this port. Elsewhere sharing would let two runs split it.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            listener.bind(("127.0.0.1" if local else "", port))  # "" is every interface
            listener.listen(launch.size)
        except OSError as error:
            problem = error
            listener.close()
            continue
        return listener
    raise LaunchError(
        f"{launch.source}: rank 0 cannot listen on port {first} for the other processes: "
        f"{problem}. Choose a free port and set MASTER_ADDR and MASTER_PORT in every process."
    )


def _address(launch: Launch, row: Message, first_machine: str) -> str:
    if launch.addresses is not None:
        return launch.addresses[row["rank"]]
    # Rank 0 is where the others found it; the others are where they came from. Those on the
    # machine of rank 0 may have come by a loopback address, which means nothing elsewhere.
    host = (launch.meeting or ("127.0.0.1", 0))[0]
    if row["rank"] and not (row["machine"] == first_machine and row["host"].startswith("127.")):
        host = row["host"]
    return f"[{host}]:{row['port']}" if ":" in host else f"{host}:{row['port']}"


def _absent(launch: Launch, there: Any) -> str:
    missing = [rank for rank in range(launch.size) if rank not in there]
    several = len(missing) != 1
    return (
        f"{launch.source}: rank{'s' * several} {', '.join(map(str, missing))} of {launch.size} did "
        f"not call smp.init within {launch.join_seconds:g} s of rank 0. Expected: every process "
        "calls smp.init at the top of the script. Look at what the missing ones were doing, or "
        f"give them more time with {_more_time(launch)}."
    )


def _more_time(launch: Launch) -> str:
    return "--join-seconds" if launch.source == "opensmp run" else "OPENSMP_RUN_JOIN_SECONDS"


# ------------------------------------------------------------------------------- the others


def _visit(launch: Launch, hello: Message) -> tuple[list[Message], dict[int, Channel]]:
    end = time.monotonic() + launch.join_seconds
    host, first = launch.meeting or ("", 0)
    problem: Exception | None = None
    while time.monotonic() < end:
        for port in range(first, first + launch.num_meeting_ports):
            try:
                channel = Channel(socket.create_connection((host, port), 2.0), launch.token)
            except OSError as error:
                problem = error
                continue
            try:
                channel.send(hello)
                # Whoever else may listen on a derived port does not know how to answer.
                reply = channel.receive(_HANDSHAKE_SECONDS)
                if reply.get("nonce") == hello["nonce"] and reply.get("kind") == "welcome":
                    # All may be there late, since the time of rank 0 may have begun later.
                    reply = channel.receive(launch.join_seconds + _HANDSHAKE_SECONDS)
                if reply.get("nonce") != hello["nonce"]:
                    raise PermissionError("the answer is not one to this process")
            except (PermissionError, TimeoutError, ValueError, OSError) as error:
                problem = error
                channel.close()
                continue
            if reply.get("kind") == "refused":
                channel.close()
                raise LaunchError(reply["text"])
            return reply["rows"], {0: channel}
        time.sleep(_PAUSE_SECONDS)
    raise LaunchError(
        f"{launch.source}: rank {launch.rank} of {launch.size} did not find rank 0 at "
        f"{host}:{first} within {launch.join_seconds:g} s ({problem}). Expected: rank 0 calls "
        "smp.init in this time, on a machine of that name, behind a port that is open to this "
        "one. Look at what rank 0 was doing, or give it more time with "
        f"{_more_time(launch)}."
    )
