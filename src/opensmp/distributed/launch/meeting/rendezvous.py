"""Rendezvous: the processes of a run exchange ranks, addresses and machines.

Rank 0 listens and the other ranks connect; when all are there, all receive the same table. Only
authenticated processes take part (`opensmp.distributed.channel.handshake`). The connections stay
open, because `opensmp.distributed.watchdog.monitor` detects failures with them. They form a star
around rank 0, which holds `size - 1` of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import resource
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from opensmp.base.message_text import plain, shown
from opensmp.distributed.channel.channel import Channel, Message, as_text
from opensmp.distributed.channel.handshake import (
    TOKEN_VARIABLE,
    Guest,
    HandshakeServer,
    Secret,
    has,
)
from opensmp.distributed.channel.peer_owner import can_tell, is_loopback
from opensmp.distributed.launch.launch import Launch
from opensmp.distributed.launch.meeting.rendezvous_client import SAME_TOKEN, more_time, visit
from opensmp.distributed.launch.meeting.table import Peer, packed
from opensmp.distributed.watchdog.verdicts.deadlock import listed
from opensmp.errors import LaunchError

_MOST_WARNINGS = 3
_OTHER_FILES = 256  # of the program itself, beside the connections of the ranks


@dataclass(frozen=True)
class Meeting:
    """The result of a rendezvous.

    Attributes:
        peers: All processes, by rank.
        channels: Open connections by rank: rank 0 has one to each other rank, which have only the
            one to rank 0.
        reservation: A socket that reserves this process's port, or None; to be kept open until the
            TensorFlow server is started.
    """

    peers: tuple[Peer, ...]
    channels: Mapping[int, Channel]
    reservation: socket.socket | None


def reserve_port(host: str = "", port: int = 0) -> tuple[socket.socket, int]:
    """Reserves a port (0: any free one); returns the socket that holds it, and its number.

    The socket is bound but does not listen, and shares its port (`SO_REUSEPORT`) with TensorFlow's
    server or the listener below; other programs cannot bind it.
    """
    # TensorFlow's server binds all interfaces by the IPv6 wildcard address if there is IPv6.
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
    """Waits for all other processes of the run."""
    assert launch.meeting is not None
    if launch.local_size == launch.size:  # all on this machine, whatever its name
        launch = dataclasses.replace(launch, meeting=("127.0.0.1", launch.meeting[1]))
    reservation: socket.socket | None = None
    if launch.addresses is None:
        reservation, port = reserve_port()
    else:
        port = int(launch.addresses[launch.rank].rsplit(":", 1)[1])
    hello = {
        "kind": "hello",
        "rank": launch.rank,
        "size": launch.size,
        "port": port,
        "machine": machine,
        "process": process,
        "network": _network(),
        "facts": dict(facts),
    }
    try:
        if launch.rank == 0:
            peers, channels = _Host(launch, hello).gather()
        else:
            peers, channels = visit(launch, hello)
    except BaseException:
        if reservation is not None:
            reservation.close()
        raise
    return Meeting(peers, channels, reservation)


_HELLO = {"rank": int, "size": int, "port": int, "machine": str, "process": int, "network": str}


def _network() -> str:
    try:
        return os.readlink("/proc/self/ns/net")
    except OSError:
        return ""


def disagreement(rows: Mapping[int, Mapping[str, Any]]) -> str | None:
    """Describes the first fact in which a process differs from rank 0; None if all agree."""
    reference = rows[0]
    for rank, facts in sorted(rows.items()):
        for name in [*reference, *(name for name in facts if name not in reference)]:
            if facts.get(name) != reference.get(name):
                return (
                    f"rank {rank} has {plain(name)}={shown(facts.get(name), 400)}, rank 0 has "
                    f"{plain(name)}={shown(reference.get(name), 400)}"
                )
    return None


# -------------------------------------------------------------------------------- rank zero


class _Host:
    """Rank 0 of the rendezvous: listens until all ranks are there."""

    def __init__(self, launch: Launch, hello: Message) -> None:
        self._launch = launch
        self._rows: dict[int, Message] = {0: hello}
        self._channels: dict[int, Channel] = {}
        self._ranks: dict[Channel, int] = {}
        self._strangers: dict[tuple[str, int], str] = {}

    def gather(self) -> tuple[tuple[Peer, ...], dict[int, Channel]]:
        launch = self._launch
        end = time.monotonic() + launch.join_seconds
        _allow_files(launch.size + _OTHER_FILES)
        with _listen(launch) as listener:
            _warn_of_strangers(launch, listener)
            secret = Secret(launch.token, launch.has_secret)
            with contextlib.closing(
                HandshakeServer(listener, secret, self._turn_away, launch.size)
            ) as reception:
                self._reception = reception
                while len(self._rows) < launch.size:
                    if time.monotonic() > end:
                        turned_away = self._strangers.values()
                        self._refuse_all(_absent(launch, self._rows.keys(), turned_away))
                    try:
                        guests = reception.wait(0.2, self._forget)
                    except OSError as error:
                        self._refuse_all(_too_many_files(launch, error))
                    for guest in guests:
                        self._take(guest)
        difference = disagreement({rank: row["facts"] for rank, row in self._rows.items()})
        if difference is not None:
            self._refuse_all(
                f"The processes do not agree: {difference}. Expected: the same program and the "
                "same configuration in every process."
            )
        rows = [self._rows[rank] for rank in range(launch.size)]
        first = rows[0]["machine"]
        peers = tuple(
            Peer(rank, _address(launch, row, first), row["machine"], row["process"], row["network"])
            for rank, row in enumerate(rows)
        )
        self._tell(packed(peers))
        return peers, self._channels

    def _tell(self, message: Message) -> None:
        text = as_text(message)
        for channel in self._channels.values():
            # The watchdog (`opensmp.distributed.watchdog.monitor`) detects a rank that has left
            # meanwhile.
            with contextlib.suppress(OSError):
                channel.send_text(text)

    def _take(self, guest: Guest) -> None:
        launch, row, channel = self._launch, guest.hello, guest.channel
        if row.get("kind") == "absent" and has(row, text=str) and launch.has_secret:
            channel.close()
            self._refuse_all(row["text"])
        if not _is_hello(row):
            channel.close()
            return
        rank, size = row["rank"], row["size"]
        if rank in self._channels:
            self._forget(self._channels[rank])  # if that process has left, this one replaces it
        if size != launch.size or not 0 < rank < size or rank in self._rows:
            fault = (
                f"there are two processes of rank {rank}"
                if size == launch.size
                else f"rank {rank} was started as one of {size}, rank 0 as one of {launch.size}"
            )
            with contextlib.suppress(OSError):
                channel.send({"kind": "refused", "text": fault})
            channel.close()
            same = ""
            if size != launch.size and launch.source == "opensmp run":
                same = " Give opensmp run the same -n and --nnodes on all machines."
            self._refuse_all(f"The processes do not fit together: {fault}.{same}")
        with contextlib.suppress(OSError):  # `gather` notices if it is gone
            channel.send({"kind": "welcome"})
        self._reception.watch(channel)
        self._rows[rank], self._channels[rank] = {**row, "host": guest.host}, channel
        self._ranks[channel] = rank

    def _forget(self, channel: Channel) -> None:
        """Removes a rank that left before the others came, so that it may be restarted."""
        try:
            if channel.receive_now() is None:
                return
        except OSError:
            pass
        rank = self._ranks.pop(channel)
        self._reception.forget(channel)
        channel.close()
        del self._channels[rank], self._rows[rank]

    def _turn_away(self, knock: Message, reason: str) -> None:
        """Warns of a process that claims a rank of this run but does not know its secret."""
        key = (knock["host"], knock["rank"])
        if key in self._strangers or len(self._strangers) == _MOST_WARNINGS:
            return
        self._strangers[key] = (
            f"a process at {knock['host']} that calls itself rank {knock['rank']} of "
            f"{knock['size']} was turned away: {reason}"
        )
        _warn(f"{self._strangers[key]}. {SAME_TOKEN}")

    def _refuse_all(self, text: str) -> NoReturn:
        self._tell({"kind": "refused", "text": text})
        for channel in self._channels.values():
            channel.close()
        raise LaunchError(text)


def _is_hello(row: Message) -> bool:
    return (
        row.get("kind") == "hello"
        and has(row, facts=dict, **_HELLO)
        and 0 < row["port"] < 65536
        and max(len(row["machine"]), len(row["network"])) <= 512
    )


def _warn(text: str) -> None:
    print(f"opensmp: rank 0 warns: {text}", file=sys.stderr, flush=True)


def _warn_of_strangers(launch: Launch, listener: socket.socket) -> None:
    """Warns, if there is no secret, who else can join or end this run."""
    host, port, *_ = listener.getsockname()
    if launch.has_secret or (is_loopback(host) and can_tell()):
        return
    who = "any user of this machine" if is_loopback(host) else "anyone who can reach this machine"
    if launch.source == "opensmp run":
        how = f"on every machine, such as by `export {TOKEN_VARIABLE}=...` before `opensmp run`"
    else:
        how = (
            f"in every process, such as by `export {TOKEN_VARIABLE}=$(openssl rand -hex 16)` "
            f"before `srun`, or with `mpirun -x {TOKEN_VARIABLE}`"
        )
    _warn(
        f"the processes of this run have no secret in common, so that {who} at port {port} can "
        f"join it or end it. Set the same {TOKEN_VARIABLE} {how}."
    )


def _listen(launch: Launch) -> socket.socket:
    host, first = launch.meeting or ("", 0)
    local = is_loopback(host)
    place = "" if not local else "::1" if host.strip("[]") == "::1" else "127.0.0.1"
    problem: OSError | None = None
    for port in range(first, first + launch.num_meeting_ports):
        dual = not local and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual or place == "::1" else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        if dual:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if launch.source == "opensmp run":
            # The launcher reserves this port. Otherwise sharing would let two runs split it.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            listener.bind((place, port))  # "" means all interfaces
            listener.listen(max(launch.size, 128))
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
    # Rank 0 has the address at which the others found it, the others the one they connected from.
    # Ranks on the machine of rank 0 may have used a loopback address, which is useless elsewhere.
    host = (launch.meeting or ("127.0.0.1", 0))[0]
    if row["rank"] and not (row["machine"] == first_machine and row["host"].startswith("127.")):
        host = row["host"]
    return f"[{host}]:{row['port']}" if ":" in host else f"{host}:{row['port']}"


def _absent(launch: Launch, there: Iterable[int], turned_away: Iterable[str]) -> str:
    missing = sorted(set(range(launch.size)) - set(there))
    text = (
        f"{launch.source}: {listed(missing)} of {launch.size} did not call smp.init within "
        f"{launch.join_seconds:g} s of rank 0. Expected: every process calls smp.init at the top "
        "of the script. Look at what the missing ones were doing, or give them more time with "
        f"{more_time(launch)}."
    )
    strangers = "; ".join(turned_away)
    if strangers:
        text += f" {strangers[0].upper()}{strangers[1:]}. {SAME_TOKEN}"
    host, port = launch.meeting or ("", 0)
    if launch.source != "opensmp run" and not _is_here(host):
        text += (
            f" They look for rank 0 at {host}:{port}, which is no address of this machine, on "
            "which rank 0 runs: check MASTER_ADDR."
        )
    return text


def _is_here(host: str) -> bool:
    """Whether a host resolves to an address of this machine."""
    with contextlib.suppress(OSError, UnicodeError):
        for family, kind, number, _, address in socket.getaddrinfo(host, 0, type=_STREAM):
            with contextlib.suppress(OSError), socket.socket(family, kind, number) as probe:
                probe.bind(address)
                return True
    return False


_STREAM = socket.SOCK_STREAM


def _allow_files(number: int) -> None:
    """Raises the number of files that this process may open, if the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = number if hard == resource.RLIM_INFINITY else min(number, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _too_many_files(launch: Launch, error: OSError) -> str:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (
        f"{launch.source}: rank 0 cannot take the connections of {launch.size - 1} other ranks: "
        f"{error}. Expected: one open file for each, beside those of the program itself; a process "
        f"may have {most}. Raise that before the start, such as by `ulimit -n "
        f"{max(2 * most, 2 * launch.size)}`."
    )
