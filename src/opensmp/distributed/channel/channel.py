"""Authenticated TCP channel for control messages between two processes of a run.

Carries small JSON objects: the exchange of addresses at the start, and heartbeats and control
messages afterwards. Tensors and pickled objects never use it.

A message is its length (4 bytes), its HMAC-SHA256 (32 bytes), and its JSON text. The HMAC key is
the run's token, and the HMAC covers the sequence number of the message in its direction. The
handshake (`opensmp.distributed.channel.handshake`) replaces the key by one per connection and
direction. Forged, replayed and reflected messages are therefore rejected. Messages are not
encrypted.
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
_AHEAD_BYTES = 1 << 9  # read at least, so that most messages take one call of the system

Message = dict[str, Any]


class Closed(ConnectionError):
    """The other side has closed the connection."""


class UnsignedError(PermissionError):
    """A message was not signed with the token of this run; anyone may have written its `text`."""

    def __init__(self, text: bytes) -> None:
        super().__init__("a message was not signed with the token of this run")
        self.text = text


class Channel:
    """One connection; any thread may send, one thread receives.

    Args:
        connection: A connected socket.
        token: The secret of the run.
        most_bytes: Maximum length of a received message; longer ones are not read.

    Attributes:
        connection: The socket.
        most_bytes: As above; may be raised once the other side is authenticated.
    """

    def __init__(
        self, connection: socket.socket, token: str, most_bytes: int = _MOST_BYTES
    ) -> None:
        self.most_bytes = most_bytes
        self.connection = connection
        self._out = self._in = hashlib.sha256(os.fsencode(token)).digest()
        self._sent = self._received = 0
        self._arrived = bytearray()  # incoming, from the begin of a message on
        self._unsent = memoryview(b"")  # the rest of a message whose sending timed out
        self._sending = threading.Lock()
        connection.setblocking(False)
        with contextlib.suppress(OSError):  # a local socket has no such options
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def agree(self, numbers: str, *, listens: bool) -> None:
        """Switches to keys for this connection only, one per direction."""
        # A number received from an unknown process may contain surrogates, which UTF-8 cannot
        # encode.
        text = numbers.encode("utf-8", "surrogatepass")
        host, guest = (_sign(self._out, who + text) for who in (b"host ", b"guest "))
        self._out, self._in = (host, guest) if listens else (guest, host)
        self._sent = self._received = 0

    def send(self, message: Message, seconds: float = 5.0) -> None:
        """Sends one message; `OSError` if the other side is gone or reads nothing for `seconds`."""
        self.send_text(as_text(message), seconds)

    def send_text(self, text: bytes, seconds: float = 5.0) -> None:
        """Sends a message that `as_text` has made, such as one for many channels."""
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
                self._unsent = rest  # sent before the next message
            if self._unsent:
                raise TimeoutError("the other side does not read")

    def receive(self, seconds: float | None = None) -> Message:
        """Returns the next message.

        Args:
            seconds: Time limit; None for none. A partly received message is kept for the next call.

        Raises:
            TimeoutError: The message was not complete in time.
            Closed: The other side is gone.
            PermissionError: The data is not a message of this run.
        """
        end = None if seconds is None else time.monotonic() + seconds
        while (message := self.receive_now()) is None:
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError("timed out")
            readable([self], left)
        return message

    def receive_now(self) -> Message | None:
        """Returns the next message if it is complete, else None."""
        if not self._fill(_HEAD_BYTES):
            return None
        (length,) = _LENGTH.unpack_from(self._arrived)
        if length > self.most_bytes:
            raise PermissionError("a message is too long to be one of this run")
        if not self._fill(_HEAD_BYTES + length):
            return None
        end = _HEAD_BYTES + length
        signature = bytes(self._arrived[_LENGTH.size : _HEAD_BYTES])
        text = bytes(self._arrived[_HEAD_BYTES:end])
        del self._arrived[:end]
        expected = _sign(self._in, _COUNT.pack(self._received) + text)
        if not hmac.compare_digest(signature, expected):
            raise UnsignedError(text)
        self._received += 1
        message = parse(text)
        if message is None:
            raise PermissionError("a message is not a JSON object")
        return message

    @property
    def has_rest(self) -> bool:
        """Whether more than the last message was read, of which no selector tells."""
        return bool(self._arrived)

    def fileno(self) -> int:
        """File descriptor for selectors; -1 once it is closed."""
        return self.connection.fileno()

    def close(self) -> None:
        """Closes the connection; may be called again."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()

    def _push(self, data: memoryview, end: float) -> memoryview:
        """Sends as much as possible until `end`; returns the rest."""
        while data:
            try:
                data = data[self.connection.send(data, socket.MSG_NOSIGNAL) :]
            except (BlockingIOError, InterruptedError):
                if time.monotonic() > end:
                    break
                time.sleep(0.01)
        return data

    def _fill(self, count: int) -> bool:
        """Reads until `count` bytes of the message have arrived; False if they have not yet."""
        while len(self._arrived) < count:
            missing = count - len(self._arrived)
            try:
                part = self.connection.recv(min(max(missing, _AHEAD_BYTES), 1 << 16))
            except (BlockingIOError, InterruptedError):
                return False
            except OSError as error:
                raise Closed(str(error)) from error
            if not part:
                raise Closed("the connection was closed")
            self._arrived += part
        return True


def readable(channels: Iterable[Channel], seconds: float | None) -> list[Channel]:
    """Channels with incoming data, or whose other side is gone.

    Unlike `select`, it supports file descriptors of any number.
    """
    by_number = {channel.fileno(): channel for channel in channels}
    closed = by_number.pop(-1, None)
    poll = select.poll()
    for number in by_number:
        poll.register(number, select.POLLIN)
    wait = 0 if closed is not None else None if seconds is None else max(0, round(seconds * 1000))
    ready = [by_number[number] for number, _ in poll.poll(wait)]
    return ready if closed is None else [*ready, closed]


def as_text(message: Message) -> bytes:
    """The text of a message, for `Channel.send_text`."""
    return json.dumps(message).encode()


def parse(text: bytes) -> Message | None:
    """The JSON object in a text; None if it is not one."""
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


def _sign(key: bytes, text: bytes) -> bytes:
    return hmac.digest(key, text, "sha256")
