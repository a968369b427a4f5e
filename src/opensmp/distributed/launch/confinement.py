"""Confines TensorFlow's server to the loopback interface if the whole run is on one machine.

TensorFlow binds its server to all interfaces (`0.0.0.0`), without authentication, whatever
addresses the cluster has. Linux can restrict a listening socket to connections from the loopback
interface (`SO_BINDTODEVICE`, without privileges since 5.7). The server is then reachable at
127.0.0.1 only, not at the machine's other addresses, not even locally.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Iterator

from opensmp.distributed.channel.peer_owner import is_loopback

_logger = logging.getLogger("opensmp")

_LOOPBACK = b"lo"
_PAUSE_SECONDS = 0.005


@contextlib.contextmanager
def confined(port: int) -> Iterator[None]:
    """Confines sockets of this process that start to listen on a port inside the context.

    A thread polls for the socket, so that it is open to other machines for some milliseconds at
    most; connections accepted from them meanwhile are closed. Logs a warning if the system refuses.
    """
    found = threading.Event()
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(_PAUSE_SECONDS):
            with contextlib.suppress(OSError):
                if _confine(port):
                    found.set()
                    return

    thread = threading.Thread(target=look, name="opensmp-confinement", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    try:
        if _confine(port) or found.is_set():
            _cut_off(port)
            return
        problem = "it was not found among the open files of this process"
    except OSError as error:
        problem = str(error)
    _logger.warning(
        "TensorFlow's server at port %d can be reached from other machines: it could not be kept "
        "to this one (%s). It has no authentication: let a firewall close the port.",
        port,
        problem,
    )


def _confine(port: int) -> bool:
    """Confines the sockets that listen on a port; False if there are none."""
    listening = [own for own in _sockets(port) if _listens(own)]
    try:
        for own in listening:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, _LOOPBACK)
    finally:
        for own in listening:
            own.close()
    return bool(listening)


def _cut_off(port: int) -> None:
    """Closes connections to a port of this process that came from another machine."""
    for own in _sockets(port):
        with own, contextlib.suppress(OSError):
            if _listens(own):
                continue
            there = own.getpeername()[0]
            if not is_loopback(there) and there != own.getsockname()[0]:
                own.shutdown(socket.SHUT_RDWR)


def _listens(own: socket.socket) -> bool:
    return bool(own.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _sockets(port: int) -> list[socket.socket]:
    """Duplicates of this process's TCP sockets on a port; the caller closes them."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        own = None
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            own = _copy(int(name))
            if own.family in (socket.AF_INET, socket.AF_INET6) and own.getsockname()[1] == port:
                found.append(own)
                own = None
        except OSError:
            pass  # closed meanwhile
        finally:
            if own is not None:
                own.close()
    return found


def _copy(number: int) -> socket.socket:
    """Duplicates a socket without changing its blocking mode, which both duplicates share."""
    blocks = os.get_blocking(number)
    own = socket.socket(fileno=os.dup(number))
    if os.get_blocking(number) != blocks:  # `socket.setdefaulttimeout` changed it
        os.set_blocking(number, blocks)
    return own
