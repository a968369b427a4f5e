from __future__ import annotations

import contextlib
import os
import resource
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import pytest

from opensmp.distributed.channel.channel import Channel, Closed, readable


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
        two.receive(60)
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
    received = [two.receive(60)["n"] for _ in range(80)]
    assert sorted(received) == sorted(list(range(4)) * 20)
    for thread in threads:
        thread.join()


def test_what_has_come_of_a_message_is_kept_until_the_rest_comes(pair):
    one, two = pair()
    raw, connection = socket.socketpair()
    with raw, connection:
        one.send({"kind": "hello", "text": "x" * 1000})
        framed = two.connection.recv(4096)
        late = Channel(connection, "secret")
        raw.sendall(framed[:500])
        with pytest.raises(TimeoutError):
            late.receive(0.05)
        assert late.receive_now() is None
        raw.sendall(framed[500:])
        assert late.receive(60)["text"] == "x" * 1000


def test_a_message_that_was_sent_in_part_goes_before_the_next(pair):
    one, two = pair()
    with pytest.raises(TimeoutError):
        one.send({"text": "x" * 5_000_000}, seconds=0.1)
    two.most_bytes = 1 << 23
    received = []
    thread = threading.Thread(target=lambda: received.extend(two.receive(60) for _ in range(2)))
    thread.start()
    one.send({"text": "next"}, seconds=60)
    thread.join(60)
    assert [len(message["text"]) for message in received] == [5_000_000, 4]


@pytest.mark.parametrize("agreed", [False, True])
def test_a_message_counts_once_and_in_one_direction(pair, agreed):
    one, two = pair()
    if agreed:
        one.agree("3 4", listens=True)
        two.agree("3 4", listens=False)
    one.send({"n": 1})
    framed = two.connection.recv(4096)
    for _ in range(2):
        one.connection.send(framed)
    assert two.receive(60) == {"n": 1}
    with pytest.raises(PermissionError, match="not signed"):
        two.receive(60)
    if agreed:
        two.connection.send(framed)
        with pytest.raises(PermissionError, match="not signed"):
            one.receive(60)


def test_keys_are_those_of_the_numbers_that_were_drawn(pair):
    one, two = pair()
    one.agree("3 4", listens=True)
    two.agree("3 5", listens=False)
    one.send({"n": 1})
    with pytest.raises(PermissionError, match="not signed"):
        two.receive(60)


def test_keys_are_made_of_any_text_that_the_other_side_has_drawn(pair):
    one, two = pair()
    one.agree("3 \ud800", listens=True)  # JSON can say what UTF-8 cannot
    two.agree("3 \ud800", listens=False)
    one.send({"n": 1})
    assert two.receive(60) == {"n": 1}


@pytest.mark.parametrize("text", [b"[1]", b"{", b"\xff", b"[" * 100_000, b"1" * 10_000])
def test_what_is_no_object_is_refused(pair, monkeypatch, text):
    one, two = pair()
    monkeypatch.setattr(
        "opensmp.distributed.channel.channel.json.dumps", lambda _: text.decode("latin-1")
    )
    one.send({})
    with pytest.raises(PermissionError):
        two.receive(60)


def test_a_message_above_the_bound_is_not_read(pair):
    one, two = pair()
    one.connection.send(struct.pack(">I", 1 << 31))
    one.connection.send(b"x" * 5000)
    with pytest.raises(PermissionError, match="too long"):
        two.receive(60)
    assert len(two.connection.recv(9999)) > 4000


def test_a_token_may_have_any_bytes():
    one, two = socket.socketpair()
    token = os.fsdecode(b"\xff\xfe secret")
    with contextlib.closing(Channel(one, token)) as here, contextlib.closing(Channel(two, token)):
        here.send({})
        assert Channel(two, token).receive(60) == {}


def test_descriptors_above_those_of_select_are_heard(pair):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limits[1] < 1500:
        pytest.skip("too few files may be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        one, two = pair()
        assert readable([one, two], 0.0) == []
        one.send({"n": 1})
        assert readable([one, two], 5.0) == [two]
        one.close()
        two.receive(60)
        assert set(readable([one, two], 5.0)) == {one, two}
    finally:
        for number in held:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
