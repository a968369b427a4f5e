from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from opensmp.runtime.channel import Channel, Closed


@pytest.fixture
def pair() -> Iterator[Callable[..., tuple[Channel, Channel]]]:
    """`pair(token, other)`: the two ends of one connection."""
    made: list[Channel] = []

    def connect(token: str = "secret", other: str = "secret") -> tuple[Channel, Channel]:
        one, two = socket.socketpair()
        made.extend([Channel(one, token), Channel(two, other)])
        return made[-2], made[-1]

    yield connect
    for channel in made:
        channel.close()


def test_message_arrives_as_it_was(pair):
    one, two = pair()
    one.send({"kind": "hello", "rank": 1, "text": "ä" * 5000})
    assert two.receive(1) == {"kind": "hello", "rank": 1, "text": "ä" * 5000}


def test_message_with_another_token_is_refused(pair):
    one, two = pair("secret", "guess")
    one.send({"kind": "hello"})
    with pytest.raises(PermissionError, match="not signed with the token"):
        two.receive(1)


def test_what_a_stranger_says_is_refused():
    raw, connection = socket.socketpair()
    with raw, connection:
        raw.send(b"GET / HTTP/1.1\r\n\r\n" + b"x" * 100)
        with pytest.raises(PermissionError):
            Channel(connection, "secret").receive(1)


def test_waiting_has_a_limit(pair):
    _one, two = pair()
    with pytest.raises(TimeoutError):
        two.receive(0.05)


def test_end_of_the_other_side_shows_at_once(pair):
    one, two = pair()
    one.close()
    with pytest.raises(Closed):
        two.receive(5)
    with pytest.raises(BrokenPipeError):
        two.send({"kind": "late"})


def test_reader_that_does_not_read_does_not_hold_the_sender_for_ever(pair):
    one, _two = pair()
    with pytest.raises(TimeoutError):
        one.send({"text": "x" * 5_000_000}, seconds=0.1)


def test_messages_of_several_threads_do_not_mix(pair):
    one, two = pair()
    threads = [
        threading.Thread(target=lambda i=i: [one.send({"n": i, "t": "y" * 999}) for _ in range(20)])
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    received = [two.receive(5)["n"] for _ in range(80)]
    assert sorted(received) == sorted(list(range(4)) * 20)
    for thread in threads:
        thread.join()
