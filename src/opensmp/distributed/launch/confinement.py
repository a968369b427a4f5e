"""TensorFlow's server is kept to this machine where the whole run is on it.

TensorFlow makes its server listen on all interfaces, without authentication, and takes no other
address: whatever the cluster's addresses are, it binds `0.0.0.0`. The system can still be told to
take connections for a socket that listens from one interface only, the loopback
(`SO_BINDTODEVICE`, for which Linux asks no privilege since 5.7). Then it is found at 127.0.0.1
only: not at this machine's other addresses, not even from here.
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
    """What begins to listen on a port of this process meanwhile can be reached from here only.

    A thread looks for it, so that it is open to others for some milliseconds at most; who has come
    in meanwhile from elsewhere is cut off. If the system refuses, a warning says so.

    Args:
        port: The port.

    Example:
        ```python
        with confined(41233):
            start_server(41233)
        ```
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
    """Whether something listens there, which is now reachable from this machine only."""
    listening = [own for own in _sockets(port) if _listens(own)]
    try:
        for own in listening:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, _LOOPBACK)
    finally:
        for own in listening:
            own.close()
    return bool(listening)


def _cut_off(port: int) -> None:
    """Ends connections to a port of this process that came from another machine."""
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
    """This process's TCP sockets of a port, as copies that are to be closed."""
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
            pass  # it was closed meanwhile
        finally:
            if own is not None:
                own.close()
    return found


def _copy(number: int) -> socket.socket:
    """A socket of the same connection; whether that blocks, which both share, stays as it is."""
    blocks = os.get_blocking(number)
    own = socket.socket(fileno=os.dup(number))
    if os.get_blocking(number) != blocks:  # by `socket.setdefaulttimeout`
        os.set_blocking(number, blocks)
    return own
