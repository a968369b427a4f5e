"""Finds the user that owns the other end of a local TCP connection.

Linux records the owner of every socket, so that it cannot be forged and no file is needed. The
kernel is asked for the one connection (`man 7 sock_diag`) or, if that is not supported, for the
table of all connections (`/proc/net/tcp`).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import ipaddress
import os
import socket
import struct
from pathlib import Path

_TABLES = {socket.AF_INET: Path("/proc/net/tcp"), socket.AF_INET6: Path("/proc/net/tcp6")}
_ESTABLISHED = 1
NOBODY = -1
"""The other end is local, but closed or not visible: no process owns it."""

_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, _NLMSG_ERROR, _NLM_F_REQUEST = 4, 20, 2, 1
_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBxI")
_PORTS, _REST = struct.Struct("!HH"), struct.Struct("=III")
_ANSWER = struct.Struct("=BBxx48x12xII")  # family, state, connection, queues, user, inode
_ANY = 0xFFFFFFFF

_IP = ipaddress.IPv4Address | ipaddress.IPv6Address


def owner(connection: socket.socket) -> int | None:
    """Id of the user that owns the other end of a TCP connection.

    Returns:
        The user's id; `NOBODY` if the process is on this machine, but has closed its end or is in
        another network namespace; None if it is on another machine, or if the system cannot tell.
    """
    try:
        here, there = connection.getsockname(), connection.getpeername()
    except OSError:
        return NOBODY
    if connection.family not in _TABLES:
        return None
    own, other = _address(here[0]), _address(there[0])
    is_local = other.is_loopback or other == own
    ask = _ask if _can_ask() else _look_up
    try:
        found = ask(other, there[1], own, here[1])
    except OSError:
        return None
    if found is not None:
        return found
    return NOBODY if is_local else None


def can_tell() -> bool:
    """Whether this system can tell the owner of a connection."""
    return _can_ask() or _TABLES[socket.AF_INET].exists()


def is_loopback(host: str) -> bool:
    """Whether a host name or address always means this machine."""
    if host == "localhost":
        return True
    try:
        return _address(host).is_loopback
    except ValueError:
        return False


def _ask(local: _IP, local_port: int, remote: _IP, remote_port: int) -> int | None:
    """Asks the kernel for the owner of the socket with these ends; None if there is none."""
    family = socket.AF_INET if local.version == 4 else socket.AF_INET6
    # Also finds IPv4 connections of IPv6 sockets.
    body = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, _ANY) + _PORTS.pack(local_port, remote_port)
    body += (
        local.packed.ljust(16, b"\0") + remote.packed.ljust(16, b"\0") + _REST.pack(0, _ANY, _ANY)
    )
    head = _HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_SOCK_DIAG) as system:
        system.settimeout(1.0)
        system.send(head + body)
        answer = system.recv(1 << 16)
    if len(answer) < _HEADER.size + 4:
        raise OSError(errno.EPROTO, "a short answer")
    if _HEADER.unpack_from(answer)[1] == _NLMSG_ERROR:
        (code,) = struct.unpack_from("=i", answer, _HEADER.size)
        if -code == errno.ENOENT:
            return None
        raise OSError(-code, os.strerror(-code))
    _, state, user, inode = _ANSWER.unpack_from(answer, _HEADER.size)
    # A closed socket belongs to no process, and is listed with user 0.
    return int(user) if state == _ESTABLISHED and inode else None


@functools.cache
def _can_ask() -> bool:
    """Whether the kernel supports the query; if not, its error is the same as for no socket."""
    address = ipaddress.ip_address("127.0.0.1")
    with (
        contextlib.suppress(OSError),
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.socket() as own,
    ):
        own.connect(listener.getsockname())
        there = listener.getsockname()[1]
        return _ask(address, own.getsockname()[1], address, there) is not None
    return False


def _look_up(local: _IP, local_port: int, remote: _IP, remote_port: int) -> int | None:
    for family, table in _TABLES.items():
        if family == socket.AF_INET and local.version == 6:
            continue
        here, there = _hex(family, local, local_port), _hex(family, remote, remote_port)
        found = _owner(table, here, there)
        if found is not None:
            return found
    return None


def _owner(table: Path, local: str, remote: str) -> int | None:
    """Owner of a connection according to a `/proc/net` table; None if it is not listed."""
    if not table.exists():  # no IPv6
        return None
    with table.open() as lines:
        for line in lines:
            if local in line and remote in line:
                _, here, there, state, _, _, _, user, _, inode, *_ = line.split()
                # A closed socket belongs to no process, and is listed with user 0.
                is_open = int(state, 16) == _ESTABLISHED and inode != "0"
                if (here, there) == (local, remote) and is_open:
                    return int(user)
    return None


def _address(text: str) -> _IP:
    address = ipaddress.ip_address(text.strip("[]").partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return mapped if mapped is not None else address


def _hex(family: int, address: _IP, port: int) -> str:
    """Address and port in the format of the table: 32-bit words in native byte order."""
    packed = address.packed
    if family == socket.AF_INET6 and address.version == 4:
        packed = ipaddress.IPv6Address(f"::ffff:{address}").packed
    words = struct.unpack(f"!{len(packed) // 4}I", packed)
    swapped = struct.unpack(f"={len(words)}I", struct.pack(f"!{len(words)}I", *words))
    return f"{''.join(f'{word:08X}' for word in swapped)}:{port:04X}"
