from __future__ import annotations

import contextlib
import errno
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from opensmp.distributed.channel.channel import Message
from opensmp.distributed.channel.handshake import (
    Guest,
    HandshakeServer,
    Secret,
    StrangerError,
    difference,
    has,
    introduce,
)

SECRET = Secret("secret", is_secret=True)
NAME = Secret("name", is_secret=False)


class Hall:
    """A reception on a thread of its own."""

    def __init__(self, secret: Secret) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.strangers: list[tuple[Message, str]] = []
        self.guests: list[Guest] = []
        self.reception = HandshakeServer(
            self.listener, secret, lambda *told: self.strangers.append(told)
        )
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._ends.is_set():
            self.guests += self.reception.wait(0.02)

    def connect(self) -> socket.socket:
        return socket.create_connection(self.listener.getsockname(), 30)

    def wait(self, condition: Callable[[], Any]) -> None:
        end = time.monotonic() + 120
        while not condition() and time.monotonic() < end:
            time.sleep(0.02)
        assert condition()

    def close(self) -> None:
        self._ends.set()
        self._thread.join(120)
        self.reception.close()
        self.listener.close()
        for guest in self.guests:
            guest.channel.close()


@pytest.fixture
def hall() -> Iterator[Callable[[Secret], Hall]]:
    made: list[Hall] = []

    def make(secret: Secret = SECRET) -> Hall:
        made.append(Hall(secret))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("secret", [SECRET, NAME])
def test_who_knows_the_token_is_heard(hall, secret):
    host = hall(secret)
    with contextlib.closing(introduce(host.connect(), secret, 1, 2, 30.0)) as channel:
        channel.send({"kind": "hello", "rank": 1})
        host.wait(lambda: host.guests)
        (guest,) = host.guests
        assert (guest.hello, guest.host) == ({"kind": "hello", "rank": 1}, "127.0.0.1")
        guest.channel.send({"kind": "welcome"})
        assert channel.receive(30.0) == {"kind": "welcome"}


def test_who_knows_another_token_is_told_so_and_so_is_the_host(hall):
    host = hall()
    with pytest.raises(StrangerError, match="OPENSMP_RUN_TOKEN is another one"):
        introduce(host.connect(), Secret("guess", is_secret=True), 1, 2, 30.0)
    host.wait(lambda: host.strangers)
    ((knock, reason),) = host.strangers
    assert (knock["rank"], knock["size"], knock["host"]) == (1, 2, "127.0.0.1")
    assert "is another one" in reason
    assert host.guests == []


@pytest.mark.parametrize(
    "text",
    [
        b"GET / HTTP/1.1\r\n\r\n" + b"x" * 100,
        struct.pack(">I", 20) + b"s" * 32 + b'{"kind":"knock"}    ',
        struct.pack(">I", 1 << 31) + b"x" * 1000,
        struct.pack(">I", 1000) + b"s" * 32 + b"[" * 1000,
        struct.pack(">I", 4) + b"s" * 32 + b"\xff\xfe\0{",
        b"\0" * 36,
    ],
)
def test_who_says_anything_else_gets_not_a_byte(hall, text):
    host = hall()
    with host.connect() as stranger:
        stranger.sendall(text)
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(1000) == b""
    assert (host.guests, host.strangers) == ([], [])


def test_what_was_overheard_lets_nobody_in(hall):
    """A whole visit is said again, byte by byte."""
    host = hall()
    said: list[bytes] = []

    connection = host.connect()
    with socket.create_server(("127.0.0.1", 0)) as between:
        guest_side = socket.create_connection(between.getsockname(), 30)
        inner, _ = between.accept()

        def carry(one: socket.socket, two: socket.socket, noted: list[bytes]) -> None:
            with contextlib.suppress(OSError):
                while data := one.recv(4096):
                    noted.append(data)
                    two.sendall(data)

        threads = [
            threading.Thread(target=carry, args=(inner, connection, said)),
            threading.Thread(target=carry, args=(connection, inner, [])),
        ]
        for thread in threads:
            thread.start()
        channel = introduce(guest_side, SECRET, 1, 2, 30.0)
        channel.send({"kind": "hello"})
        host.wait(lambda: host.guests)
        channel.close()
        host.guests[0].channel.close()
        for thread in threads:
            thread.join(120)
        inner.close()
        connection.close()
    with host.connect() as replay:
        replay.sendall(b"".join(said))
        replay.settimeout(30)
        with contextlib.suppress(ConnectionResetError):
            while replay.recv(4096):
                pass
    assert len(host.guests) == 1


def test_a_host_that_does_not_know_the_token_is_not_believed():
    """It repeats what it hears."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connection = socket.create_connection(listener.getsockname(), 30)
        echo, _ = listener.accept()

        def repeat() -> None:
            with contextlib.suppress(OSError), echo:
                while data := echo.recv(4096):
                    echo.sendall(data)

        thread = threading.Thread(target=repeat)
        thread.start()
        with pytest.raises(PermissionError):
            introduce(connection, SECRET, 1, 2, 30.0)
        thread.join(120)


def test_a_silent_host_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(TimeoutError):
        introduce(socket.create_connection(listener.getsockname(), 30), SECRET, 1, 2, 0.2)


def test_the_number_of_strangers_is_bounded_and_they_are_sent_away(hall, monkeypatch):
    monkeypatch.setattr("opensmp.distributed.channel.handshake._KNOCK_SECONDS", 1.0)
    host = hall()
    made = []
    for _ in range(400):
        made.append(host.connect())
        assert host.reception.num_visits <= 256
    with contextlib.closing(introduce(host.connect(), SECRET, 1, 2, 30.0)) as channel:
        channel.send({"kind": "hello"})
        host.wait(lambda: host.guests)
    host.wait(lambda: host.reception.num_visits == 0)
    for connection in made:
        connection.close()


def test_those_who_trickle_are_sent_away_in_time(hall, monkeypatch):
    monkeypatch.setattr("opensmp.distributed.channel.handshake._KNOCK_SECONDS", 0.5)
    host = hall()
    with host.connect() as stranger, contextlib.suppress(OSError):
        stranger.sendall(struct.pack(">I", 500))
        for _ in range(300):
            stranger.sendall(b"x")
            time.sleep(0.1)
        raise AssertionError("was never sent away")


def test_too_many_open_files_cost_the_strangers_their_place(hall, monkeypatch):
    host = hall()
    with host.connect():
        host.wait(lambda: host.reception.num_visits == 1)
        accept = socket.socket.accept
        failures = [OSError(errno.EMFILE, "Too many open files")]

        def scarce(self: socket.socket) -> Any:
            if failures:
                raise failures.pop()
            return accept(self)

        monkeypatch.setattr(socket.socket, "accept", scarce)
        with contextlib.closing(introduce(host.connect(), SECRET, 1, 2, 30.0)) as channel:
            channel.send({"kind": "hello"})
            host.wait(lambda: host.guests)
            assert host.reception.num_visits == 0


def test_too_many_open_files_without_strangers_are_an_error(monkeypatch):
    def full(self: socket.socket) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        reception = HandshakeServer(listener, SECRET)
        with socket.create_connection(listener.getsockname(), 30):
            monkeypatch.setattr(socket.socket, "accept", full)
            with pytest.raises(OSError, match="Too many open files"):
                reception.wait(30.0)
        reception.close()


@pytest.mark.parametrize(
    ("own", "other", "reason"),
    [
        (SECRET, {"secret": True}, "another one"),
        (SECRET, {"secret": False}, "is set in this process, but not in it"),
        (NAME, {"secret": True}, "is set in it, but not in this process"),
        (NAME, {"secret": False}, "another run"),
        (NAME, {"secret": False, "user": True}, "another user"),
    ],
)
def test_the_reason_is_the_one_that_can_be_mended(own, other, reason):
    assert reason in difference(own, other)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"rank": 1}, True),
        ({"rank": True}, False),
        ({"rank": 1.0}, False),
        ({"rank": None}, False),
        ({}, False),
    ],
)
def test_fields_have_exactly_their_type(message, expected):
    assert has(message, rank=int) == expected


def test_what_is_no_number_that_could_be_printed_is_no_field():
    assert has({"rank": 2**63 - 1}, rank=int)
    for rank in (True, "1", None, 2**63, -(2**63), 10**5000):
        assert not has({"rank": rank}, rank=int)
