"""Ranks that have ended are told of, so that nobody waits for them at the rendezvous.

Whoever waits there cannot know it: only the launcher sees a process end that never came.
"""

from __future__ import annotations

import contextlib
import select
import socket

from opensmp.runtime.channel import Channel
from opensmp.runtime.rendezvous import reserve_port

_SECONDS = 0.5


class Absence:
    """Tells the ranks that wait for each other who will not come.

    Args:
        port: Port of this machine at which rank 0 listens for the others.
        token: Secret of the run.
        size: Number of ranks.

    Example:
        ```python
        with contextlib.closing(Absence(port, token, 4)) as absence:
            absence.tell(2)  # again and again, for the others may begin to wait later
        ```
    """

    def __init__(self, port: int, token: str, size: int) -> None:
        self._port, self._token, self._size = port, token, size
        self._listener: socket.socket | None = None

    def tell(self, rank: int) -> None:
        """Ends the waiting of those who wait now for a rank that has ended."""
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
        """Leaves the port to the next run."""
        if self._listener is not None:
            self._listener.close()

    def _visit(self, text: str) -> None:
        """Tells rank 0, which tells the others; if nobody listens, nobody waits."""
        connection = socket.create_connection(("127.0.0.1", self._port), _SECONDS)
        with contextlib.closing(Channel(connection, self._token)) as channel:
            channel.send({"kind": "absent", "text": text}, _SECONDS)

    def _answer_instead(self, text: str) -> None:
        """Tells those who have come to rank 0."""
        if self._listener is None:
            self._listener, _ = reserve_port("127.0.0.1", self._port)  # beside the launcher's
            self._listener.listen(self._size)
        while select.select([self._listener], [], [], 0.0)[0]:
            connection, _ = self._listener.accept()
            with contextlib.closing(Channel(connection, self._token)) as channel:
                nonce = channel.receive(_SECONDS)["nonce"]
                channel.send({"kind": "refused", "nonce": nonce, "text": text}, _SECONDS)
