"""What comes over the network: from strangers, who know no secret, and from one who knows it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import secrets
import socket
import struct
import zlib
from typing import Any

import pytest
from fuzz.bounds import cases, taken
from fuzz.strategies import json_texts, json_values, mutated, mutilated
from hypothesis import given
from hypothesis import strategies as st

from opensmp.distributed.channel.channel import Channel
from opensmp.distributed.channel.handshake import HandshakeServer, Secret, introduce
from opensmp.distributed.launch.launch import Launch
from opensmp.distributed.launch.launchers import detect
from opensmp.distributed.launch.meeting import rendezvous, rendezvous_client, table

TOKEN = "secret"
NUMBER = "0123456789abcdef0123456789abcdef"
KNOCK = {"kind": "knock", "number": NUMBER, "rank": 1, "size": 2, "secret": True}
CHALLENGE = {"kind": "challenge", "to": NUMBER, "number": NUMBER}
STRANGER = {"kind": "stranger", "to": NUMBER, "secret": True, "user": True}
HELLO = {
    "kind": "hello",
    "rank": 1,
    "size": 2,
    "port": 4711,
    "machine": "node1",
    "process": 12,
    "network": "net:[4026531840]",
    "facts": {"partitions": 2, "devices": ["CPU:0"], "plan": None},
}
COLUMNS = {
    "address": ["node0:1", "node1:1"],
    "machine": ["m", "m"],
    "process": [7, 7],
    "network": ["n", "n"],
}


def table_of(columns: str) -> dict[str, Any]:
    """A table as rank 0 sends it, whatever stands in it."""
    text = zlib.compress(columns.encode("utf-8", "surrogatepass"))
    return {"kind": "table", "rows": base64.b64encode(text).decode()}


TABLE = table_of(json.dumps(COLUMNS))
REFUSED = {"kind": "refused", "text": "there are two processes of rank 1"}
MESSAGES = st.sampled_from((KNOCK, CHALLENGE, STRANGER, HELLO, TABLE, REFUSED, {"kind": "welcome"}))
SIZES = (0, 1, 3, 1 << 10, (1 << 20) + 1, (1 << 32) - 1)


def framed(text: bytes, number: int = 0, token: str = TOKEN) -> bytes:
    """A message as one who knows the secret of the run signs it, whatever stands in it."""
    key = hashlib.sha256(token.encode()).digest()
    signature = hmac.new(key, struct.pack(">Q", number) + text, hashlib.sha256).digest()
    return struct.pack(">I", len(text)) + signature + text


@st.composite
def frames(draw: st.DrawFn, message: Any) -> bytes:
    """Messages that are signed or not, cut short, or longer or shorter than they say."""
    data = b""
    for number in range(draw(st.integers(1, 2))):
        text = draw(json_texts(mutated(message))).encode("utf-8", "surrogatepass")
        if draw(st.integers(0, 9)) == 0:
            text = draw(st.binary(max_size=50))
        # One of a few hundred thousand bytes is as good as one of many.
        data += framed(text[:200_000], number)
    way = draw(st.integers(0, 7))
    if way == 0:
        at = draw(st.integers(0, len(data)))
        return data[:at]
    if way == 1:
        return struct.pack(">I", draw(st.sampled_from(SIZES))) + data[4:]
    if way == 2:
        at = draw(st.integers(0, len(data) - 1))
        return data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]
    if way == 3:
        return draw(st.sampled_from((b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01", b"", b"\0" * 99)))
    return data


def said(data: bytes) -> socket.socket:
    """A connection on whose other side this was said, and then nothing more."""
    here, there = socket.socketpair()
    for end in (here, there):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 21)
    there.setblocking(False)
    with contextlib.suppress(OSError):
        there.sendall(data)  # what does not fit is not needed
    there.shutdown(socket.SHUT_WR)
    here_and_there.append(there)
    return here


here_and_there: list[socket.socket] = []


@pytest.fixture(autouse=True)
def _connections_are_closed():
    yield
    for connection in here_and_there:
        connection.close()
    here_and_there.clear()


def closed(call: Any, data: bytes) -> Any:
    """Runs a case on a connection of its own, which is closed again."""

    def run() -> Any:
        connection = said(data)
        try:
            return call(connection)
        finally:
            connection.close()
            here_and_there.pop().close()

    return taken(run, refusals=(OSError,))


@cases()
@given(data=frames(MESSAGES))
def test_messages_of_a_channel_are_taken_or_refused(data):
    result = closed(lambda connection: Channel(connection, TOKEN).receive(5.0), data)
    assert result.error is not None or isinstance(result.value, dict)


@cases()
@given(data=frames(st.sampled_from((CHALLENGE, STRANGER))), is_secret=st.booleans())
def test_answers_to_a_guest_are_taken_or_refused(data, is_secret):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(secrets, "token_hex", lambda *_: NUMBER)
        secret = Secret(TOKEN, is_secret)
        closed(lambda connection: introduce(connection, secret, 1, 2, 5.0), data)


@cases()
@given(guests=st.lists(frames(st.sampled_from((KNOCK, HELLO))), min_size=1, max_size=3))
def test_guests_are_heard_or_sent_away(guests):
    def call() -> None:
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            told: list[str] = []
            reception = HandshakeServer(
                listener, Secret(TOKEN, True), lambda _, why: told.append(why)
            )
            stack.callback(reception.close)
            for data in guests:
                guest = stack.enter_context(socket.create_connection(listener.getsockname()))
                guest.setblocking(False)
                with contextlib.suppress(OSError):
                    guest.sendall(data)
                guest.shutdown(socket.SHUT_WR)
            for _ in range(5):
                for heard in reception.wait(0.0):
                    heard.channel.close()
            assert len(told) <= len(guests)

    taken(call, refusals=())


@cases()
@given(rows=st.lists(mutated(st.just(HELLO)) | json_values(), min_size=1, max_size=3))
def test_what_ranks_say_of_themselves_is_taken_or_refused(rows):
    launch = Launch("opensmp run", 0, 2, meeting=("127.0.0.1", 1))

    def call() -> None:
        hellos = [row for row in rows if isinstance(row, dict) and rendezvous._is_hello(row)]
        for row in hellos:
            rendezvous._address(launch, {**row, "host": "10.0.0.1"}, "node0")
        rendezvous.disagreement({rank: row["facts"] for rank, row in enumerate(hellos)} or {0: {}})

    taken(call, refusals=())


@cases()
@given(
    reply=mutated(st.sampled_from((TABLE, REFUSED)))
    | json_values()
    | json_texts(mutated(st.just(COLUMNS)) | json_values()).map(table_of)
)
def test_tables_of_ranks_are_taken_or_refused(reply):
    def call() -> Any:
        if not isinstance(reply, dict):
            return None
        if rendezvous_client._is_refusal(reply):
            return reply["text"] + ""
        return table.unpacked(reply, 2)

    taken(call, refusals=())


@cases()
@given(text=mutilated(st.just("opensmp")))
def test_secrets_of_any_text_are_taken(text):
    environ = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "9"}
    launch = detect({**environ, "OPENSMP_RUN_TOKEN": text})
    data = framed(b"{}", token=launch.token)
    result = closed(lambda connection: Channel(connection, launch.token).receive(5.0), data)
    assert result.value == {}
