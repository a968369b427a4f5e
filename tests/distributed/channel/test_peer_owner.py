from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from opensmp.distributed.channel import peer_owner
from opensmp.distributed.channel.peer_owner import NOBODY, can_tell, is_loopback, owner

CONNECT = """
import os, socket, sys
host, port, user = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
host.encode("idna")  # another user may not be able to read what Python loads for it
if user != os.geteuid():
    os.setgroups([])
    os.setuid(user)
with socket.create_connection((host, port), 10) as connection:
    print(connection.recv(1))
"""


@pytest.fixture(autouse=True, params=["asked", "looked up"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How the system is asked: for the connection, or for the table of all."""
    assert peer_owner._can_ask()
    monkeypatch.setattr(peer_owner, "_can_ask", lambda: request.param == "asked")


@pytest.fixture(params=["127.0.0.1", "::1", "both"])
def listener(request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    if request.param == "127.0.0.1":
        made = socket.create_server((request.param, 0))
    elif not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    elif request.param == "::1":
        made = socket.create_server((request.param, 0), family=socket.AF_INET6)
    else:
        made = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    made.settimeout(60)
    with made:
        yield made


def visited_by(listener: socket.socket, user: int) -> int | None:
    """Who the system says has connected, where a process of that user has."""
    host, port = listener.getsockname()[:2]
    host = {"::": "127.0.0.1"}.get(host, host)
    command = [sys.executable, "-c", CONNECT, host, str(port), str(user)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        connection, _ = listener.accept()
        with connection:
            found = owner(connection)
            connection.send(b"x")
        process.communicate(timeout=120)
    return found


def test_a_process_of_this_user_is_known_as_such(listener):
    assert can_tell()
    assert visited_by(listener, os.geteuid()) == os.geteuid()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act for another user")
def test_a_process_of_another_user_is_known_as_such(listener):
    assert visited_by(listener, 65534) == 65534


def test_the_side_that_connects_also_knows_the_other(listener):
    host, port = listener.getsockname()[:2]
    host = {"::": "127.0.0.1"}.get(host, host)
    with socket.create_connection((host, port), 10) as guest, listener.accept()[0]:
        assert owner(guest) == os.geteuid()


def test_a_connection_that_was_closed_belongs_to_nobody(listener):
    host, port = listener.getsockname()[:2]
    guest = socket.create_connection(({"::": "127.0.0.1"}.get(host, host), port), 10)
    with listener.accept()[0] as connection:
        guest.close()
        assert owner(connection) == NOBODY


def test_other_kinds_of_connections_say_nothing():
    one, two = socket.socketpair()
    with one, two:
        assert owner(one) is None


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.3.2.1", True),
        ("::1", True),
        ("[::1]", True),
        ("::ffff:127.0.0.1", True),
        ("10.0.0.1", False),
        ("node0", False),
        ("", False),
    ],
)
def test_names_that_always_mean_this_machine(host, expected):
    assert is_loopback(host) == expected
