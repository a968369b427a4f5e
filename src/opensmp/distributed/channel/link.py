"""What the system knows of a TCP connection: whether packets arrive, and whether they are answered.

The other side's system acknowledges what it receives even while its process is stopped. So this
tells a process that is frozen from a network that is interrupted (`man 7 tcp`, `TCP_INFO`).
"""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

_PENDING = struct.Struct("=24xI")  # segments that are not acknowledged
_LAST_ACK_RECEIVED = struct.Struct("=56xI")  # milliseconds
_BYTES_ACKNOWLEDGED = struct.Struct("=120xQ")
_INFO_BYTES = 128
_DEAF_SECONDS, _MUTE_SECONDS = 3.0, 2.0


class LinkState(NamedTuple):
    """State of a connection over which something is sent every second.

    Attributes:
        silent_seconds: Time since anything has come, at least an acknowledgement.
        unanswered_seconds: For how long nothing of what was sent has been acknowledged.
    """

    silent_seconds: float
    unanswered_seconds: float

    @property
    def is_deaf(self) -> bool:
        """Whether nothing arrives here."""
        return self.silent_seconds >= _DEAF_SECONDS

    @property
    def is_mute(self) -> bool:
        """Whether nothing of what is sent arrives there."""
        return self.unanswered_seconds >= _MUTE_SECONDS

    @property
    def is_lost(self) -> bool:
        """Whether the network is interrupted in at least one direction."""
        return self.is_deaf or self.is_mute


class Link:
    """Samples the state of a connection; at least once a second if it is in doubt."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._acknowledged = -1
        self._progressed = 0.0

    def sample(self, now: float) -> LinkState | None:
        """The state now; None if it is not TCP, or if the system does not tell."""
        try:
            info = self._connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
        except (OSError, AttributeError):
            return None
        if len(info) < _INFO_BYTES:
            return None
        (acknowledged,) = _BYTES_ACKNOWLEDGED.unpack_from(info)
        (pending,) = _PENDING.unpack_from(info)
        (silent,) = _LAST_ACK_RECEIVED.unpack_from(info)
        if not pending or acknowledged != self._acknowledged:
            self._acknowledged, self._progressed = acknowledged, now
        return LinkState(silent / 1000, now - self._progressed)
