"""Which user a process belongs to that has connected from this machine.

The system keeps it with every connection (Linux, `/proc/net/tcp`), so that it can be neither
claimed nor guessed, and nothing has to be kept in a file.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from pathlib import Path

_TABLES = {socket.AF_INET: Path("/proc/net/tcp"), socket.AF_INET6: Path("/proc/net/tcp6")}
_ESTABLISHED = "01"
_ANOTHER = -1  # of this machine, but the system does not say whose

_IP = ipaddress.IPv4Address | ipaddress.IPv6Address


def owner(connection: socket.socket) -> int | None:
    """The id of the user whose process is at the other end of a TCP connection.

    Args:
        connection: A connected socket.

    Returns:
        The user's id; -1 if the process is on this machine, but has closed its end or is in
        another network namespace; None if it is on another machine, or if the system does not
        say.

    Example:
        ```python
        if owner(connection) != os.geteuid():
            connection.close()
        ```
    """
    try:
        here, there = connection.getsockname(), connection.getpeername()
    except OSError:
        return _ANOTHER
    if connection.family not in _TABLES:
        return None
    own, other = _address(here[0]), _address(there[0])
    is_local = other.is_loopback or other == own
    try:
        for family, table in _TABLES.items():
            if family == socket.AF_INET and other.version == 6:
                continue
            found = _owner(table, _hex(family, other, there[1]), _hex(family, own, here[1]))
            if found is not None:
                return found
    except OSError:
        return None
    return _ANOTHER if is_local else None


def can_tell() -> bool:
    """Whether this system says to whom connections belong."""
    return _TABLES[socket.AF_INET].exists()


def is_loopback(host: str) -> bool:
    """Whether a host, by its name or address, is always the machine that one is on."""
    if host == "localhost":
        return True
    try:
        return _address(host).is_loopback
    except ValueError:
        return False


def _owner(table: Path, local: str, remote: str) -> int | None:
    """The user of the connection in a table of the system; None if it is not there."""
    if not table.exists():  # a system without IPv6
        return None
    with table.open() as lines:
        for line in lines:
            if local in line and remote in line:
                _, here, there, state, _, _, _, user, _, inode, *_ = line.split()
                # One that was closed belongs to no process, and shows as that of user 0.
                if (here, there, state) == (local, remote, _ESTABLISHED) and inode != "0":
                    return int(user)
    return None


def _address(text: str) -> _IP:
    address = ipaddress.ip_address(text.strip("[]").partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return mapped if mapped is not None else address


def _hex(family: int, address: _IP, port: int) -> str:
    """Address and port as the table has them: words in the order of this processor."""
    packed = address.packed
    if family == socket.AF_INET6 and address.version == 4:
        packed = ipaddress.IPv6Address(f"::ffff:{address}").packed
    words = struct.unpack(f"!{len(packed) // 4}I", packed)
    swapped = struct.unpack(f"={len(words)}I", struct.pack(f"!{len(words)}I", *words))
    return f"{''.join(f'{word:08X}' for word in swapped)}:{port:04X}"
