"""Messages between two processes that know the same secret.

Small JSON objects over TCP, for everything that is not data: the exchange of addresses at the
start, and signs of life afterwards. Tensors and objects never travel this way.

A message is its length (4 bytes), its HMAC-SHA256 under the run's token (32 bytes), and its
text. A stranger who connects cannot make a process act on anything; what is sent is not
hidden from those who can read the network.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import socket
import struct
import threading
import time
from typing import Any

_MOST_BYTES = 1 << 20
_LENGTH = struct.Struct(">I")

Message = dict[str, Any]


class Closed(ConnectionError):
    """The other side is gone."""


class Channel:
    """One connection; any thread may send, one thread receives.

    Args:
        connection: A connected socket.
        token: The secret of the run.

    Example:
        ```python
        channel.send({"kind": "hello", "rank": 1})
        reply = channel.receive(seconds=5)
        ```
    """

    def __init__(self, connection: socket.socket, token: str) -> None:
        self._socket = connection
        self._key = hashlib.sha256(token.encode()).digest()
        self._sending = threading.Lock()
        with contextlib.suppress(OSError):  # a local socket has no such options
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, message: Message, seconds: float = 5.0) -> None:
        """Sends one message.

        Raises:
            OSError: The other side is gone, or has read nothing for that long.
        """
        text = json.dumps(message).encode()
        framed = _LENGTH.pack(len(text)) + self._sign(text) + text
        with self._sending:
            _send_all(self._socket, framed, time.monotonic() + seconds)

    def receive(self, seconds: float | None = None) -> Message:
        """The next message.

        Args:
            seconds: How long to wait for it; None for ever.

        Raises:
            TimeoutError: Nothing came.
            Closed: The other side is gone.
            PermissionError: What came was not signed with the token of this run.
        """
        end = None if seconds is None else time.monotonic() + seconds
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size, end))
        if length > _MOST_BYTES:
            raise PermissionError("a message is too long to be one of this run")
        signature = self._read(hashlib.sha256().digest_size, end)
        text = self._read(length, end)
        if not hmac.compare_digest(signature, self._sign(text)):
            raise PermissionError("a message was not signed with the token of this run")
        message = json.loads(text)
        if not isinstance(message, dict):
            raise PermissionError("a message is not a JSON object")
        return message

    def fileno(self) -> int:
        """For `select`."""
        return self._socket.fileno()

    def close(self) -> None:
        """Ends the connection; nothing happens if it has ended."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _sign(self, text: bytes) -> bytes:
        return hmac.new(self._key, text, hashlib.sha256).digest()

    def _read(self, count: int, end: float | None) -> bytes:
        read = b""
        while len(read) < count:
            self._socket.settimeout(None if end is None else max(0.01, end - time.monotonic()))
            try:
                part = self._socket.recv(count - len(read))
            except TimeoutError:
                raise
            except OSError as error:
                raise Closed(str(error)) from error
            if not part:
                raise Closed("the connection was closed")
            read += part
        return read


def _send_all(connection: socket.socket, data: bytes, end: float) -> None:
    # The receiving thread changes the socket's timeout, so that this one must not depend on it.
    view = memoryview(data)
    while view:
        try:
            sent = connection.send(view, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except (BlockingIOError, InterruptedError):
            if time.monotonic() > end:
                raise TimeoutError("the other side does not read") from None
            time.sleep(0.01)
            continue
        view = view[sent:]
