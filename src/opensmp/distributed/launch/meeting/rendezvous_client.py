"""The side of the rendezvous (`rendezvous.py` in this folder) of ranks other than 0."""

from __future__ import annotations

import socket
import time

from opensmp.distributed.channel.channel import Channel, Closed, Message
from opensmp.distributed.channel.handshake import (
    TOKEN_VARIABLE,
    Secret,
    StrangerError,
    has,
    introduce,
)
from opensmp.distributed.launch.launch import Launch
from opensmp.distributed.launch.meeting.table import Peer, unpacked
from opensmp.errors import LaunchError

SAME_TOKEN = (
    f"Expected: the same {TOKEN_VARIABLE} in every process of a run, or no such variable in any "
    "process of a run of one machine and one user."
)
"""Part of error messages: what the processes of a run must have in common."""

_HANDSHAKE_SECONDS = 5.0
_PAUSE_SECONDS = 0.1
_REFUSED_SECONDS = 3.0  # time for an earlier run on the port to end
_MOST_BYTES, _PEER_BYTES = 1 << 20, 1 << 12


def visit(launch: Launch, hello: Message) -> tuple[tuple[Peer, ...], dict[int, Channel]]:
    """Connects to rank 0, retrying until all ranks are there; returns their rows and channels."""
    end = time.monotonic() + launch.join_seconds
    host, first = launch.meeting or ("", 0)
    problem: object = None
    refused_since: float | None = None
    while time.monotonic() < end:
        for port in range(first, first + launch.num_meeting_ports):
            try:
                peers, channel = _ask(launch, hello, (host, port))
            except StrangerError as error:
                problem = error
                # A derived port may belong to another run, and the next port to this one.
                refused_since = refused_since or time.monotonic()
                is_sure = launch.num_meeting_ports == 1
                if is_sure and time.monotonic() > refused_since + _REFUSED_SECONDS:
                    raise LaunchError(
                        f"{launch.source}: rank {launch.rank} of {launch.size} is not let in by "
                        f"what listens at {host}:{port} for other ranks: {error}. {SAME_TOKEN} "
                        "If it is another run, choose another port for this one."
                    ) from None
            except PermissionError as error:
                problem = f"what listens there is no rank 0 of opensmp: {error}"
            except OSError as error:
                problem, refused_since = error, None
            except UnicodeError as error:  # the host name is invalid
                problem = error
            else:
                return peers, {0: channel}
        time.sleep(_PAUSE_SECONDS)
    raise LaunchError(
        f"{launch.source}: rank {launch.rank} of {launch.size} did not find rank 0 at "
        f"{host}:{first} within {launch.join_seconds:g} s ({problem}). Expected: rank 0 calls "
        "smp.init in this time, on a machine of that name, behind a port that is open to this "
        "one. Look at what rank 0 was doing, or give it more time with "
        f"{more_time(launch)}. A rank that is started anew after all ranks have met cannot come "
        "to them: start all ranks again."
    )


def more_time(launch: Launch) -> str:
    """The option or variable that extends the time that processes wait for each other."""
    return "--join-seconds" if launch.source == "opensmp run" else "OPENSMP_RUN_JOIN_SECONDS"


def _ask(
    launch: Launch, hello: Message, place: tuple[str, int]
) -> tuple[tuple[Peer, ...], Channel]:
    """All ranks, by rank 0 if it listens at that address; `LaunchError` if it refuses."""
    # Another program on a derived port fails the handshake.
    channel = introduce(
        socket.create_connection(place, 2.0),
        Secret(launch.token, launch.has_secret),
        launch.rank,
        launch.size,
        _HANDSHAKE_SECONDS,
    )
    try:
        channel.most_bytes = max(_MOST_BYTES, _PEER_BYTES * launch.size)
        channel.send(hello)
        reply = channel.receive(_HANDSHAKE_SECONDS)
        if reply.get("kind") == "welcome":
            # Rank 0 may have started to wait later, so that the table may come late.
            reply = channel.receive(launch.join_seconds + _HANDSHAKE_SECONDS)
        if _is_refusal(reply):
            raise LaunchError(reply["text"])
        peers = unpacked(reply, launch.size)
        if peers is None:
            raise Closed("the answer makes no sense")
    except BaseException:
        channel.close()
        raise
    channel.most_bytes = _MOST_BYTES
    return peers, channel


def _is_refusal(reply: Message) -> bool:
    return reply.get("kind") == "refused" and has(reply, text=str)
