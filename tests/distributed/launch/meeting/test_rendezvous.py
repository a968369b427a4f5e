from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import resource
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from patience import patient

from opensmp.distributed.channel import handshake
from opensmp.distributed.channel.handshake import HandshakeServer, Secret, introduce
from opensmp.distributed.launch.launch import Launch
from opensmp.distributed.launch.meeting import rendezvous
from opensmp.distributed.launch.meeting.rendezvous import Meeting, disagreement, meet, reserve_port
from opensmp.distributed.launch.meeting.table import Peer, packed
from opensmp.errors import LaunchError


@pytest.fixture
def launch():
    """Rank 0 of 2 on this machine, behind a port that is free."""
    reservation, port = reserve_port("127.0.0.1")
    with reservation:
        yield Launch(
            "opensmp run",
            size=2,
            meeting=("127.0.0.1", port),
            token="secret",
            has_secret=True,
            join_seconds=60.0,
        )


def meet_all(*launches: Launch, facts: Any = ({}, {}, {})) -> list[Any]:
    """What each rank gets, be it a meeting or an error; their sockets are closed."""
    results: list[Any] = [None] * len(launches)

    def visit(index: int) -> None:
        try:
            meeting = meet(launches[index], f"machine {index}", 100 + index, facts[index])
        except Exception as error:
            results[index] = error
            return
        results[index] = meeting
        for channel in meeting.channels.values():
            channel.close()
        if meeting.reservation is not None:
            meeting.reservation.close()

    threads = [threading.Thread(target=visit, args=(index,)) for index in range(len(launches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return results


def test_all_ranks_get_the_same_table(launch):
    three = [dataclasses.replace(launch, rank=rank, size=3) for rank in (2, 0, 1)]
    results = meet_all(*three)
    assert all(isinstance(result, Meeting) for result in results), results
    assert results[0].peers == results[1].peers == results[2].peers
    peers = results[0].peers
    assert [peer.rank for peer in peers] == [0, 1, 2]
    assert [peer.process for peer in peers] == [101, 102, 100]
    assert len({peer.address for peer in peers}) == 3
    assert {peer.address.split(":")[0] for peer in peers} == {"127.0.0.1"}
    assert sorted(results[1].channels) == [1, 2]
    assert list(results[0].channels) == list(results[2].channels) == [0]


def test_given_addresses_are_kept(launch):
    addresses = ("a:2222", "b:2223")
    both = [dataclasses.replace(launch, rank=rank, addresses=addresses) for rank in (0, 1)]
    results = meet_all(*both)
    assert [peer.address for peer in results[1].peers] == ["a:2222", "b:2223"]
    assert results[0].reservation is None


def test_absent_rank_is_named_to_those_who_came(launch):
    early = [dataclasses.replace(launch, rank=rank, size=3, join_seconds=1.5) for rank in (0, 1)]
    results = meet_all(*early)
    for result in results:
        assert isinstance(result, LaunchError)
        assert "rank 2 of 3 did not call smp.init within 1.5 s of rank 0" in str(result)


def test_absent_rank_0_is_named(launch):
    (result,) = meet_all(dataclasses.replace(launch, rank=1, join_seconds=0.3))
    assert isinstance(result, LaunchError)
    assert "rank 1 of 2 did not find rank 0 at 127.0.0.1" in str(result)


def test_disagreement_is_told_to_all(launch):
    both = [launch, dataclasses.replace(launch, rank=1)]
    results = meet_all(*both, facts=({"partitions": 2}, {"partitions": 4}))
    for result in results:
        assert isinstance(result, LaunchError)
        assert "rank 1 has partitions=4, rank 0 has partitions=2" in str(result)


def test_two_processes_of_one_rank_are_refused(launch):
    three = [dataclasses.replace(launch, rank=rank, size=3) for rank in (0, 1, 1)]
    results = meet_all(*three)
    assert any("there are two processes of rank 1" in str(result) for result in results)
    assert all(isinstance(result, LaunchError) for result in results)


def test_other_world_size_is_refused(launch):
    results = meet_all(launch, dataclasses.replace(launch, rank=1, size=3))
    assert "rank 1 was started as one of 3, rank 0 as one of 2" in str(results[0])


def test_absent_ranks_may_have_looked_elsewhere(launch):
    place = ("203.0.113.7", launch.meeting[1])  # an address for documentation
    host = dataclasses.replace(launch, meeting=place, source="by hand", join_seconds=0.5)
    (result,) = meet_all(host)
    assert "203.0.113.7" in str(result)
    assert "no address of this machine" in str(result)


@pytest.mark.parametrize(
    ("ours", "theirs", "told"),
    [
        ("a", "b", ["is another one than that of this process"] * 2),
        ("a", "", ["is set in this process, but not in it", "set in it, but not in this process"]),
        ("", "b", ["set in it, but not in this process", "is set in this process, but not in it"]),
        ("", "", ["it belongs to another run"] * 2),
    ],
)
def test_processes_of_different_secrets_are_told_so_on_both_sides(
    launch, capsys, monkeypatch, ours, theirs, told
):
    monkeypatch.setattr(
        "opensmp.distributed.launch.meeting.rendezvous_client._REFUSED_SECONDS", 0.3
    )
    host = dataclasses.replace(
        launch, token=ours or "x", has_secret=bool(ours), join_seconds=patient(3.0)
    )
    guest = dataclasses.replace(
        launch, rank=1, token=theirs or "y", has_secret=bool(theirs), join_seconds=60.0
    )
    results = meet_all(host, guest)
    shown = capsys.readouterr().err
    assert shown.count("rank 0 warns") == 1
    assert "calls itself rank 1 of 2 was turned away" in shown
    assert told[0] in shown
    assert "rank 1 of 2 did not call smp.init" in str(results[0])
    assert "was turned away" in str(results[0])
    assert "rank 1 of 2 is not let in by what listens at 127.0.0.1" in str(results[1])
    assert told[1] in str(results[1])
    for text in (shown, str(results[0]), str(results[1])):
        assert "the same OPENSMP_RUN_TOKEN in every process" in text


def test_a_process_of_another_user_is_let_in_only_with_a_token(launch, monkeypatch, capsys):
    monkeypatch.setattr(
        "opensmp.distributed.launch.meeting.rendezvous_client._REFUSED_SECONDS", 0.3
    )
    monkeypatch.setattr(handshake, "owner", lambda connection: os.geteuid() + 1)
    both = [launch, dataclasses.replace(launch, rank=1)]
    assert [type(result) for result in meet_all(*both)] == [Meeting, Meeting]
    named = [
        dataclasses.replace(each, has_secret=False, join_seconds=patient(3.0)) for each in both
    ]
    results = meet_all(*named)
    assert "it belongs to another user" in str(results[0])
    assert "it belongs to another user" in str(results[1])


@pytest.mark.parametrize(
    ("source", "how"),
    [
        ("Slurm", "Set the same OPENSMP_RUN_TOKEN in every process, such as by"),
        ("opensmp run", "Set the same OPENSMP_RUN_TOKEN on every machine, such as by"),
    ],
)
def test_without_a_secret_rank_0_says_once_who_can_come(launch, capsys, source, how):
    place = ("0.0.0.0", launch.meeting[1])
    named = [
        dataclasses.replace(
            launch, source=source, rank=rank, meeting=place, token="job", has_secret=False
        )
        for rank in (0, 1)
    ]
    assert [type(result) for result in meet_all(*named)] == [Meeting, Meeting]
    shown = capsys.readouterr().err
    assert shown.count("warns") == 1
    assert "anyone who can reach this machine at port" in shown
    assert how in shown
    assert ("srun" in shown) == (source == "Slurm")
    secret = [dataclasses.replace(each, has_secret=True) for each in named]
    here = [dataclasses.replace(each, meeting=launch.meeting) for each in named]
    for both in (secret, here):
        assert [type(result) for result in meet_all(*both)] == [Meeting, Meeting]
    assert capsys.readouterr().err == ""


def test_ranks_of_one_machine_meet_where_no_other_machine_can_reach_them(launch, monkeypatch):
    listened = []

    class Noted(HandshakeServer):
        def __init__(self, listener: socket.socket, *args: Any) -> None:
            listened.append(listener.getsockname()[0])
            super().__init__(listener, *args)

    monkeypatch.setattr(rendezvous, "HandshakeServer", Noted)
    place = (socket.gethostname(), launch.meeting[1])
    both = [
        dataclasses.replace(launch, rank=rank, meeting=place, local_rank=rank, local_size=2)
        for rank in (0, 1)
    ]
    results = meet_all(*both)
    assert [type(result) for result in results] == [Meeting, Meeting], results
    assert listened == ["127.0.0.1"]
    assert {peer.address.split(":")[0] for peer in results[0].peers} == {"127.0.0.1"}


# -------------------------------------------------------------------------------- strangers


@contextlib.contextmanager
def strangers(port: int, number: int, text: bytes) -> Iterator[list[socket.socket]]:
    """So many connections that say this, and no more, once somebody listens there."""
    made: list[socket.socket] = []
    stopped = threading.Event()

    def hold() -> None:
        while len(made) < number and not stopped.is_set():
            try:
                made.append(socket.create_connection(("127.0.0.1", port), 1))
                made[-1].sendall(text)
            except OSError:
                time.sleep(0.01)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        yield made
    finally:
        stopped.set()
        thread.join(120)
        for connection in made:
            connection.close()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\0",
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack(">I", 1 << 30) + b"x" * 10000,
        struct.pack(">I", 1 << 9) + b"x" * 100,
        struct.pack(">I", 600) + b"x" * 32 + b"[" * 600,
    ],
    ids=["silent", "one byte", "HTTP", "too long", "half", "deep"],
)
def test_strangers_keep_nobody_waiting(launch, text):
    late = dataclasses.replace(launch, rank=1)
    results: list[Any] = []
    host = dataclasses.replace(launch, join_seconds=120.0)
    with strangers(launch.meeting[1], 300, text) as there:
        thread = threading.Thread(target=lambda: results.extend(meet_all(host)))
        thread.start()
        end = time.monotonic() + 60
        while len(there) < 300 and time.monotonic() < end:  # strangers are the first
            time.sleep(0.05)
        assert there
        results += meet_all(late)
        thread.join(60)
    assert [type(result) for result in results] == [Meeting, Meeting], results


@pytest.mark.parametrize(
    "hello",
    [
        {},
        {"kind": "absent"},
        {"kind": "absent", "text": 3},
        {"kind": "hello"},
        *(
            {"kind": "hello", "rank": rank, "size": 2}
            for rank in (None, [1], "1", 1e999, True, {"a": 1})
        ),
        *(
            {"rank": 1, "size": 2, "kind": "hello", "machine": "m", "process": 1, "network": "n"}
            | {"port": 1, "facts": {}}
            | fault
            for fault in ({"port": 0}, {"facts": []}, {"machine": 1}, {"machine": "m" * 5000})
        ),
    ],
)
def test_a_greeting_that_does_not_fit_is_passed_over(launch, hello):
    secret = Secret("secret", is_secret=True)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.extend(meet_all(launch)))
    thread.start()
    channel = introduce(connected(launch.meeting), secret, 1, 2, 30.0)
    channel.send(hello)
    with pytest.raises(OSError, match="closed"):
        channel.receive(30.0)
    channel.close()
    results += meet_all(dataclasses.replace(launch, rank=1))
    thread.join(60)
    assert [type(result) for result in results] == [Meeting, Meeting], results


def connected(place: Any) -> socket.socket:
    """A connection to who listens there, sooner or later."""
    for _ in range(1000):
        with contextlib.suppress(OSError):
            return socket.create_connection(place, 5)
        time.sleep(0.02)
    raise AssertionError("nobody listens")


def test_only_a_launcher_with_a_secret_can_say_that_a_rank_will_not_come(launch):
    results = []
    for has_secret in (True, False):
        host = dataclasses.replace(launch, has_secret=has_secret, join_seconds=patient(3.0))
        thread = threading.Thread(target=lambda host=host: results.extend(meet_all(host)))
        thread.start()
        secret = Secret("secret", has_secret)
        channel = introduce(connected(launch.meeting), secret, -1, 2, 30.0)
        channel.send({"kind": "absent", "text": "rank 1 has ended"})
        thread.join(60)
        channel.close()
    assert str(results[0]) == "rank 1 has ended"
    assert "rank 1 of 2 did not call smp.init" in str(results[1])


def test_more_files_than_select_can_number_are_no_hindrance(launch):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limits[1] < 1500:
        pytest.skip("too few files may be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        results = meet_all(launch, dataclasses.replace(launch, rank=1))
    finally:
        for number in held:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert [type(result) for result in results] == [Meeting, Meeting], results


def test_a_rank_that_leaves_and_comes_again_is_welcome(launch):
    secret = Secret("secret", is_secret=True)
    three = dataclasses.replace(launch, size=3)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.extend(meet_all(three)))
    thread.start()
    row = {"rank": 1, "size": 3, "port": 1, "machine": "m", "process": 1, "network": ""}
    for _ in range(3):
        channel = introduce(connected(launch.meeting), secret, 1, 3, 30.0)
        channel.send({"kind": "hello", "facts": {}, **row})
        assert channel.receive(30.0) == {"kind": "welcome"}
        channel.close()
    results += meet_all(*(dataclasses.replace(three, rank=rank) for rank in (2, 1)))
    thread.join(60)
    assert [type(result) for result in results] == [Meeting] * 3, results


def test_ranks_may_leave_at_any_moment_until_all_are_there(launch):
    rng, size = random.Random(1), 24
    secret = Secret("secret", is_secret=True)
    world = dataclasses.replace(launch, size=size)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.extend(meet_all(world)))
    thread.start()
    row = {"size": size, "port": 1, "machine": "m", "process": 1, "network": "", "facts": {}}
    reset = struct.pack("ii", 1, 0)
    for _ in range(100):
        rank, connection = rng.randrange(1, size), connected(launch.meeting)
        if rng.random() < 0.5:  # without a word
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        if rng.random() < 0.7:
            channel = introduce(connection, secret, rank, size, 30.0)
            if rng.random() < 0.8:
                channel.send({"kind": "hello", "rank": rank, **row})
            if rng.random() < 0.5:
                with contextlib.suppress(TimeoutError):
                    channel.receive(0.2)
        connection.close()
    rest = [dataclasses.replace(world, rank=rank) for rank in range(1, size)]
    results += meet_all(*rest, facts=[{}] * size)
    thread.join(60)
    assert [type(result) for result in results] == [Meeting] * size, results


def test_a_rank_that_leaves_while_the_table_goes_out_is_left_to_the_watch(launch, monkeypatch):
    secret = Secret("secret", is_secret=True)
    results: list[Any] = []
    guests = []

    def leave(rows: Any) -> None:
        reset = struct.pack("ii", 1, 0)  # closes without a word
        guests[0].connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        guests[0].connection.close()
        time.sleep(0.2)

    monkeypatch.setattr(rendezvous, "disagreement", leave)
    thread = threading.Thread(target=lambda: results.extend(meet_all(launch)))
    thread.start()
    guests.append(introduce(connected(launch.meeting), secret, 1, 2, 30.0))
    row = {"rank": 1, "size": 2, "port": 1, "machine": "m", "process": 1, "network": ""}
    guests[0].send({"kind": "hello", "facts": {}, **row})
    thread.join(60)
    assert [type(result) for result in results] == [Meeting], results


def test_the_table_of_thousands_of_ranks_is_read(launch):
    size = 3000
    row = {"address": f"{'node' * 60}:20000", "machine": "m" * 300, "process": 1, "network": "n"}
    peers = [Peer(rank, **row) for rank in range(size)]
    results: list[Any] = []
    with socket.create_server(launch.meeting, reuse_port=True) as listener:
        guest = dataclasses.replace(launch, rank=1, size=size)
        thread = threading.Thread(target=lambda: results.extend(meet_all(guest)))
        thread.start()
        with contextlib.closing(HandshakeServer(listener, Secret("secret", True))) as reception:
            while not (guests := reception.wait(1.0)):
                pass
            guests[0].channel.send({"kind": "welcome"})
            guests[0].channel.send(packed(peers), 60.0)
            thread.join(60)
            guests[0].channel.close()
    assert [type(result) for result in results] == [Meeting], results
    assert list(results[0].peers) == peers


@pytest.mark.parametrize(
    "reply",
    [
        {},
        {"kind": "refused"},
        {"kind": "table"},
        {"kind": "table", "rows": [1, 2]},
        {"kind": "table", "rows": "AAAA"},
        packed([Peer(0, "127.0.0.1:1", "m", 1)]),
    ],
)
def test_an_answer_that_does_not_fit_is_none(launch, reply):
    results: list[Any] = []
    with socket.create_server(launch.meeting, reuse_port=True) as listener:
        guest = dataclasses.replace(launch, rank=1, join_seconds=patient(1.5))
        thread = threading.Thread(target=lambda: results.extend(meet_all(guest)))
        thread.start()
        with contextlib.closing(HandshakeServer(listener, Secret("secret", True))) as reception:
            while thread.is_alive():
                for guest in reception.wait(0.1):
                    guest.channel.send(reply)
                    guest.channel.close()
        thread.join(60)
    assert "rank 1 of 2 did not find rank 0" in str(results[0])
    assert "the answer makes no sense" in str(results[0])


def test_another_program_at_the_port_is_named_as_what_it_is(launch):
    guest = dataclasses.replace(launch, rank=1, join_seconds=patient(1.0))
    results: list[Any] = []
    with socket.create_server(launch.meeting, reuse_port=True) as listener:
        thread = threading.Thread(target=lambda: results.extend(meet_all(guest)))
        thread.start()
        listener.settimeout(0.1)
        while thread.is_alive():
            with contextlib.suppress(OSError), listener.accept()[0] as connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 5)
        thread.join(120)
    assert "what listens there is no rank 0 of opensmp" in str(results[0])


def test_rank_0_that_leaves_and_comes_again_is_found(launch):
    secret = Secret("secret", is_secret=True)
    results: list[Any] = []
    guest = dataclasses.replace(launch, rank=1)
    thread = threading.Thread(target=lambda: results.extend(meet_all(guest)))
    with socket.create_server(launch.meeting, reuse_port=True) as listener:
        thread.start()
        with contextlib.closing(HandshakeServer(listener, secret)) as reception:
            while not (guests := reception.wait(1.0)):
                pass
            guests[0].channel.send({"kind": "welcome"})
            guests[0].channel.close()
    results += meet_all(launch)
    thread.join(60)
    assert [type(result) for result in results] == [Meeting, Meeting], results


def test_a_rank_that_comes_after_the_others_have_met_is_told_so(launch):
    results = meet_all(launch, dataclasses.replace(launch, rank=1))
    assert [type(result) for result in results] == [Meeting, Meeting], results
    (late,) = meet_all(dataclasses.replace(launch, rank=1, join_seconds=0.5))
    assert isinstance(late, LaunchError)
    assert "A rank that is started anew after all ranks have met cannot come" in str(late)


@pytest.mark.parametrize("limit", [24, 64])
def test_as_many_files_may_be_open_as_there_are_ranks(launch, limit):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (held + limit, limits[1]))
    try:
        forty = [dataclasses.replace(launch, rank=rank, size=40) for rank in range(40)]
        results = meet_all(*forty, facts=[{}] * 40)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert [type(result) for result in results] == [Meeting] * 40, results


def test_derived_port_that_is_taken_is_passed_over():
    with socket.create_server(("127.0.0.1", 0)) as other:
        launch = Launch(
            "Open MPI",
            size=2,
            meeting=("127.0.0.1", other.getsockname()[1]),
            num_meeting_ports=4,
            token="job",
            join_seconds=60.0,
        )
        results = meet_all(launch, dataclasses.replace(launch, rank=1))
    assert [type(result) for result in results] == [Meeting, Meeting], results


def test_reserved_port_is_nobody_elses_but_can_be_used():
    reservation, port = reserve_port("127.0.0.1")
    with reservation, socket.socket() as stranger, socket.socket() as own:
        with pytest.raises(OSError, match="in use"):
            stranger.bind(("127.0.0.1", port))
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        own.bind(("127.0.0.1", port))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ({0: {"a": 1}, 1: {"a": 1}}, None),
        ({0: {"a": 1}, 1: {"a": 2}}, "rank 1 has a=2, rank 0 has a=1"),
        ({0: {"a": 1, "b": 2}, 2: {"a": 1}}, "rank 2 has b=None, rank 0 has b=2"),
        ({0: {}, 1: {"c": 1}}, "rank 1 has c=1, rank 0 has c=None"),
    ],
)
def test_first_difference_is_the_one_that_is_named(rows, expected):
    assert disagreement(rows) == expected
