"""Lets the launcher tell ranks that wait at the rendezvous that a rank has exited.

Only the launcher notices the exit of a process that never came to the rendezvous.
"""

from __future__ import annotations

import contextlib
import socket
import time

from opensmp.distributed.channel.handshake import HandshakeServer, Secret, introduce
from opensmp.distributed.launch.meeting.rendezvous import reserve_port

_SECONDS = 0.5
_TURN_SECONDS = 0.02  # time limit for one round of handshake messages


class ExitNotifier:
    """Tells the ranks at the rendezvous, where rank 0 is on `host`, which rank will not come."""

    def __init__(self, port: int, token: str, size: int, host: str = "127.0.0.1") -> None:
        self._port, self._size, self._host = port, size, host
        self._secret = Secret(token, is_secret=True)
        self._listener: socket.socket | None = None
        self._reception: HandshakeServer | None = None

    def tell(self, rank: int) -> None:
        """Makes the ranks that currently wait at the rendezvous fail, because a rank has exited."""
        text = (
            f"opensmp run: rank {rank} of {self._size} ended, with exit code 0, before it called "
            "smp.init. Expected: every process calls smp.init at the top of the script, and does "
            "its part to the end."
        )
        with contextlib.suppress(OSError):
            if rank == 0:
                self._answer_instead(text)
            else:
                self._visit(text)

    def close(self) -> None:
        """Releases the port."""
        if self._reception is not None:
            self._reception.close()
        if self._listener is not None:
            self._listener.close()

    def _visit(self, text: str) -> None:
        """Tells rank 0, which tells the others; no listener means that no rank waits."""
        connection = socket.create_connection((self._host, self._port), _SECONDS)
        channel = introduce(connection, self._secret, -1, self._size, _SECONDS)
        with contextlib.closing(channel):
            channel.send({"kind": "absent", "text": text}, _SECONDS)

    def _answer_instead(self, text: str) -> None:
        """Listens in place of rank 0, and rejects the ranks that connect to it."""
        if self._listener is None:
            where = "" if self._host != "127.0.0.1" else self._host
            self._listener, _ = reserve_port(where, self._port)  # shares the launcher's port
            self._listener.listen(max(self._size, 128))
        if self._reception is None:
            self._reception = HandshakeServer(self._listener, self._secret)
        end = time.monotonic() + _SECONDS
        while time.monotonic() < end:
            guests = self._reception.wait(_TURN_SECONDS)
            for guest in guests:
                with contextlib.closing(guest.channel), contextlib.suppress(OSError):
                    guest.channel.send({"kind": "refused", "text": text}, _SECONDS)
            if not guests and not self._reception.num_visits:
                return
