"""Messages between two processes that know the same secret.

Small JSON objects over TCP, for everything that is not data: the exchange of addresses at the
start, and signs of life afterwards. Tensors and objects never travel this way.

A message is its length (4 bytes), its HMAC-SHA256 (32 bytes), and its text. The HMAC is made
with the run's token, and covers how many messages went before it in this direction; once
`opensmp.distributed.channel.handshake` has drawn numbers for the connection, each direction has a
key of its own. So nothing that a stranger says, repeats or turns back counts. What is sent is not
hidden from those who can read the network.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterable
from typing import Any

_MOST_BYTES = 1 << 20
_LENGTH = struct.Struct(">I")
_COUNT = struct.Struct(">Q")
_SIGNATURE_BYTES = hashlib.sha256().digest_size
_HEAD_BYTES = _LENGTH.size + _SIGNATURE_BYTES

Message = dict[str, Any]


class Closed(ConnectionError):
    """The other side is gone."""


class UnsignedError(PermissionError):
    """A message was not signed with the token of this run.

    Attributes:
        text: What stood in it. Any stranger may have written it.
    """

    def __init__(self, text: bytes) -> None:
        super().__init__("a message was not signed with the token of this run")
        self.text = text


class Channel:
    """One connection; any thread may send, one thread receives.

    Args:
        connection: A connected socket.
        token: The secret of the run.
        most_bytes: How long a message that comes may be. What is longer is not read.

    Attributes:
        connection: The same.
        most_bytes: The same, to be changed when more is known of the other side.

    Example:
        ```python
        channel.send({"kind": "hello", "rank": 1})
        reply = channel.receive(seconds=5)
        ```
    """

    def __init__(
        self, connection: socket.socket, token: str, most_bytes: int = _MOST_BYTES
    ) -> None:
        self.most_bytes = most_bytes
        self.connection = connection
        self._out = self._in = hashlib.sha256(os.fsencode(token)).digest()
        self._sent = self._received = 0
        self._arrived = bytearray()  # of a message that is not there in full
        self._unsent = memoryview(b"")  # the rest of a message, whose time was over
        self._sending = threading.Lock()
        connection.setblocking(False)
        with contextlib.suppress(OSError):  # a local socket has no such options
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def agree(self, numbers: str, *, listens: bool) -> None:
        """Goes over to keys that are only for this connection, one for each direction.

        Args:
            numbers: What both sides have drawn for it.
            listens: Whether this is the side that was visited.
        """
        # What a stranger has sent may be text that UTF-8 has no bytes for.
        text = numbers.encode("utf-8", "surrogatepass")
        host, guest = (_sign(self._out, who + text) for who in (b"host ", b"guest "))
        self._out, self._in = (host, guest) if listens else (guest, host)
        self._sent = self._received = 0

    def send(self, message: Message, seconds: float = 5.0) -> None:
        """Sends one message.

        Raises:
            OSError: The other side is gone, or has read nothing for that long.
        """
        text = json.dumps(message).encode()
        end = time.monotonic() + seconds
        with self._sending:
            self._unsent = self._push(self._unsent, end)
            if not self._unsent:
                signature = _sign(self._out, _COUNT.pack(self._sent) + text)
                framed = memoryview(_LENGTH.pack(len(text)) + signature + text)
                rest = self._push(framed, end)
                if len(rest) == len(framed):
                    raise TimeoutError("the other side does not read")
                self._sent += 1
                self._unsent = rest  # goes before the next message
            if self._unsent:
                raise TimeoutError("the other side does not read")

    def receive(self, seconds: float | None = None) -> Message:
        """The next message.

        Args:
            seconds: How long to wait for it; None for ever. What has come of it until then is
                kept for the next call.

        Raises:
            TimeoutError: It did not come in full.
            Closed: The other side is gone.
            PermissionError: What came is no message of this run.
        """
        end = None if seconds is None else time.monotonic() + seconds
        while (message := self.receive_now()) is None:
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError("timed out")
            readable([self], left)
        return message

    def receive_now(self) -> Message | None:
        """The next message if it is there in full, else None.

        Raises:
            Closed: The other side is gone.
            PermissionError: What came is no message of this run.
        """
        if not self._fill(_HEAD_BYTES):
            return None
        (length,) = _LENGTH.unpack_from(self._arrived)
        if length > self.most_bytes:
            raise PermissionError("a message is too long to be one of this run")
        if not self._fill(_HEAD_BYTES + length):
            return None
        signature = bytes(self._arrived[_LENGTH.size : _HEAD_BYTES])
        text = bytes(self._arrived[_HEAD_BYTES:])
        self._arrived.clear()
        expected = _sign(self._in, _COUNT.pack(self._received) + text)
        if not hmac.compare_digest(signature, expected):
            raise UnsignedError(text)
        self._received += 1
        message = parse(text)
        if message is None:
            raise PermissionError("a message is not a JSON object")
        return message

    def fileno(self) -> int:
        """For a selector; -1 once it is closed."""
        return self.connection.fileno()

    def close(self) -> None:
        """Ends the connection; nothing happens if it has ended."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()

    def _push(self, data: memoryview, end: float) -> memoryview:
        """Sends what it can until then; gives the rest."""
        while data:
            try:
                data = data[self.connection.send(data, socket.MSG_NOSIGNAL) :]
            except (BlockingIOError, InterruptedError):
                if time.monotonic() > end:
                    break
                time.sleep(0.01)
        return data

    def _fill(self, count: int) -> bool:
        """Reads until so many bytes of the message are there; False if they are not yet."""
        while len(self._arrived) < count:
            try:
                part = self.connection.recv(min(count - len(self._arrived), 1 << 16))
            except (BlockingIOError, InterruptedError):
                return False
            except OSError as error:
                raise Closed(str(error)) from error
            if not part:
                raise Closed("the connection was closed")
            self._arrived += part
        return True


def readable(channels: Iterable[Channel], seconds: float | None) -> list[Channel]:
    """Those of which something has come, or whose other side is gone.

    Other than `select`, it takes descriptors of any number.

    Args:
        channels: Where something may come.
        seconds: How long to wait; None for ever.

    Example:
        ```python
        for channel in readable(channels, 0.5):
            message = channel.receive(5.0)
        ```
    """
    by_number = {channel.fileno(): channel for channel in channels}
    closed = by_number.pop(-1, None)
    poll = select.poll()
    for number in by_number:
        poll.register(number, select.POLLIN)
    wait = 0 if closed is not None else None if seconds is None else max(0, round(seconds * 1000))
    ready = [by_number[number] for number, _ in poll.poll(wait)]
    return ready if closed is None else [*ready, closed]


def parse(text: bytes) -> Message | None:
    """The JSON object that is written there; None if there is none."""
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


def _sign(key: bytes, text: bytes) -> bytes:
    return hmac.new(key, text, hashlib.sha256).digest()
