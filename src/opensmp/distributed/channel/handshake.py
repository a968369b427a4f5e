"""Mutual authentication of two processes of a run.

The guest connects and sends a knock with a random number; the host answers with its own random
number, and all further messages are signed with keys derived from both. A recorded connection can
therefore not be replayed, and neither side acts on a message before the other has proved that it
knows the token. If the token is not secret, the operating system tells which user owns the other
end of a local connection: it must be the user of this process.

The host serves all guests concurrently. Guests that send nothing, or send slowly, delay no other
guest and are disconnected after a time limit.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import selectors
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from opensmp.distributed.channel.channel import Channel, Closed, Message, UnsignedError, parse
from opensmp.distributed.channel.peer_owner import NOBODY, owner

TOKEN_VARIABLE = "OPENSMP_RUN_TOKEN"

_KNOCK_SECONDS = 5.0
_HELLO_SECONDS = 15.0  # for the first message of a guest that knows the token
_KNOCK_BYTES, _HELLO_BYTES = 1 << 10, 1 << 16
_MOST_GUESTS = 256
_MOST_AT_ONCE = 64
_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Secret(NamedTuple):
    """The token that the processes of a run share.

    Attributes:
        token: Secret token, or public name, of the run.
        is_secret: Whether it is secret; if not, processes of this machine must have the same user.
    """

    token: str
    is_secret: bool


class StrangerError(PermissionError):
    """The other side is not a process of this run, or does not accept this one as such."""


@dataclass(frozen=True)
class Guest:
    """An authenticated process: its connection, the address it came from, and its first message."""

    channel: Channel
    host: str
    hello: Message


@dataclass
class _Visit:
    """A connection that is not authenticated yet."""

    channel: Channel
    host: str
    end: float
    has_knocked: bool = False


def has(message: Message, **types: type) -> bool:
    """Whether a message has fields of exactly these types; integers have at most 63 bits.

    A Boolean is not an integer here.
    """
    for name, kind in types.items():
        value = message.get(name)
        if type(value) is not kind:
            return False
        # Python refuses to print integers of thousands of digits.
        if isinstance(value, int) and value.bit_length() > 63:
            return False
    return True


def introduce(
    connection: socket.socket, secret: Secret, rank: int, size: int, seconds: float
) -> Channel:
    """Authenticates this process and the host of a run to each other, from the guest's side.

    Returns:
        The channel, on which the host expects the hello message.

    Raises:
        StrangerError: The host knows another token, belongs to another user, or is not a host.
        OSError: The host is gone, or did not answer.
    """
    channel = Channel(connection, secret.token, _HELLO_BYTES)
    number = secrets.token_hex(16)
    knock = {"kind": "knock", "number": number, "rank": rank, "size": size}
    try:
        channel.send({**knock, "secret": secret.is_secret}, seconds)
        try:
            answer = channel.receive(seconds)
        except UnsignedError as error:
            answer = parse(error.text) or {}  # not authenticated: for errors only
            if has(answer, kind=str, to=str, secret=bool) and answer["to"] == number:
                raise StrangerError(difference(secret, answer)) from None
            raise
        if not has(answer, kind=str, to=str) or answer["to"] != number:
            raise StrangerError("the answer is not one to this process")
        if answer["kind"] == "stranger":
            raise StrangerError(difference(secret, answer))
        if not has(answer, number=str):
            raise StrangerError("the answer is not one to this process")
        if not secret.is_secret:
            user = owner(connection)
            if user == NOBODY:
                raise Closed("it has closed the connection")
            if user not in (None, os.geteuid()):
                raise StrangerError(difference(secret, {"secret": False, "user": True}))
    except BaseException:
        channel.close()
        raise
    channel.agree(f"{answer['number']} {number}", listens=False)
    return channel


def difference(own: Secret, other: Message) -> str:
    """Describes why the other side does not belong to the run."""
    mine, its = own.is_secret, other.get("secret") is True
    if other.get("user") is True:
        return f"it belongs to another user, and there is no {TOKEN_VARIABLE} that both know"
    if mine and its:
        return f"its {TOKEN_VARIABLE} is another one than that of this process"
    if mine or its:
        return f"{TOKEN_VARIABLE} is set in {'this process' if mine else 'it'}, but not in " + (
            "it" if mine else "this process"
        )
    return "it belongs to another run"


class HandshakeServer:
    """The host's side of the handshake, for many guests concurrently.

    Args:
        listener: A listening socket; the caller closes it.
        secret: What guests must know.
        on_stranger: Called with the knock and the reason when a process that claims a rank of the
            run is rejected.
        size: Number of guests that may come at once.
    """

    def __init__(
        self,
        listener: socket.socket,
        secret: Secret,
        on_stranger: Callable[[Message, str], Any] | None = None,
        size: int = 0,
    ) -> None:
        self._listener, self._secret, self._on_stranger = listener, secret, on_stranger
        self._most_guests = max(_MOST_GUESTS, size)
        self._visits: dict[Channel, _Visit] = {}
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)

    def wait(self, seconds: float, known: Callable[[Channel], Any] | None = None) -> list[Guest]:
        """Handles connections and messages, waiting up to `seconds`; returns the new guests.

        `known` is called with each channel given to `watch` that has data or is closed, before any
        guest is handled.
        """
        ready = [key.fileobj for key, _ in self._selector.select(seconds)]
        for item in ready:
            if isinstance(item, Channel) and item not in self._visits and known is not None:
                known(item)
        guests = []
        for item in ready:
            visit = self._visits.get(item) if isinstance(item, Channel) else None
            if visit is not None:
                guest = self._hear(visit)
                if guest is not None:
                    guests.append(guest)
        if self._listener in ready:
            self._admit()
        now = time.monotonic()
        for visit in [visit for visit in self._visits.values() if now > visit.end]:
            self._send_away(visit)
        return guests

    @property
    def num_visits(self) -> int:
        """Number of connections that are not authenticated yet."""
        return len(self._visits)

    def watch(self, channel: Channel) -> None:
        """Also waits for data on this channel from now on."""
        self._selector.register(channel, selectors.EVENT_READ)

    def forget(self, channel: Channel) -> None:
        """Stops watching a channel."""
        self._selector.unregister(channel)

    def close(self) -> None:
        """Closes all connections that are not authenticated."""
        for visit in list(self._visits.values()):
            self._send_away(visit)
        self._selector.close()

    def _admit(self) -> None:
        for _ in range(_MOST_AT_ONCE):
            try:
                connection, address = self._listener.accept()
            except OSError as error:
                if error.errno in _FULL:
                    if not self._visits:
                        raise
                    self._make_room()
                    continue
                return  # no connection is pending, or it was closed already
            if len(self._visits) >= self._most_guests:
                self._make_room()
            channel = Channel(connection, self._secret.token, _KNOCK_BYTES)
            host = str(address[0]).removeprefix("::ffff:").partition("%")[0]
            visit = _Visit(channel, host, time.monotonic() + _KNOCK_SECONDS)
            self._visits[channel] = visit
            self._selector.register(channel, selectors.EVENT_READ)

    def _make_room(self) -> None:
        """Closes the oldest unauthenticated connection of the host that has the most of them."""
        # A process of the run authenticates within moments, so that it is never the oldest.
        ((crowd, _),) = Counter(visit.host for visit in self._visits.values()).most_common(1)
        self._send_away(next(visit for visit in self._visits.values() if visit.host == crowd))

    def _send_away(self, visit: _Visit) -> None:
        self._let_go(visit)
        visit.channel.close()

    def _let_go(self, visit: _Visit) -> None:
        del self._visits[visit.channel]
        self._selector.unregister(visit.channel)

    def _hear(self, visit: _Visit) -> Guest | None:
        try:
            message = visit.channel.receive_now()
            if message is None:
                return None
            if visit.has_knocked:
                self._let_go(visit)
                return Guest(visit.channel, visit.host, message)
            self._answer(visit, message)
        except UnsignedError as error:
            if not visit.has_knocked:
                self._refuse(visit, parse(error.text), {})
            self._send_away(visit)
        except OSError:
            self._send_away(visit)
        return None

    def _answer(self, visit: _Visit, knock: Message) -> None:
        if not _is_knock(knock):
            self._send_away(visit)
            return
        user = None if self._secret.is_secret else owner(visit.channel.connection)
        if user not in (None, os.geteuid()):
            if user != NOBODY:
                self._refuse(visit, knock, {"user": True})
            self._send_away(visit)
            return
        number = secrets.token_hex(16)
        visit.channel.send({"kind": "challenge", "to": knock["number"], "number": number}, 0.0)
        visit.channel.agree(f"{number} {knock['number']}", listens=True)
        visit.channel.most_bytes = _HELLO_BYTES
        visit.has_knocked, visit.end = True, time.monotonic() + _HELLO_SECONDS

    def _refuse(self, visit: _Visit, knock: Message | None, why: Message) -> None:
        """Tells a rejected process of opensmp the reason."""
        if knock is None or not _is_knock(knock):
            return
        reason = difference(self._secret, {**knock, **why})
        answer = {"kind": "stranger", "to": knock["number"], "secret": self._secret.is_secret}
        with contextlib.suppress(OSError):
            visit.channel.send({**answer, **why}, 0.0)
        if self._on_stranger is not None:
            self._on_stranger({**knock, "host": visit.host}, reason)


def _is_knock(message: Message) -> bool:
    return (
        has(message, kind=str, number=str, rank=int, size=int, secret=bool)
        and message["kind"] == "knock"
        and len(message["number"]) <= 64
    )
