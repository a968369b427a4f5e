from __future__ import annotations

import dataclasses
import socket
import threading
from typing import Any

import pytest

from opensmp.errors import LaunchError
from opensmp.runtime.launched import Launch
from opensmp.runtime.rendezvous import Meeting, disagreement, meet, reserve_port


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
            join_seconds=5.0,
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
        thread.join(30)
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
    early = [dataclasses.replace(launch, rank=rank, size=3, join_seconds=0.5) for rank in (0, 1)]
    results = meet_all(*early)
    for result in results:
        assert isinstance(result, LaunchError)
        assert "rank 2 of 3 did not call smp.init within 0.5 s of rank 0" in str(result)


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


def test_process_with_another_token_is_a_stranger(launch):
    host = dataclasses.replace(launch, join_seconds=1.0)
    guest = dataclasses.replace(launch, rank=1, token="guess", join_seconds=0.5)
    results = meet_all(host, guest)
    assert "rank 1 of 2 did not call smp.init" in str(results[0])
    assert "rank 1 of 2 did not find rank 0" in str(results[1])


def test_derived_port_that_is_taken_is_passed_over():
    with socket.create_server(("127.0.0.1", 0)) as other:
        launch = Launch(
            "Open MPI",
            size=2,
            meeting=("127.0.0.1", other.getsockname()[1]),
            num_meeting_ports=4,
            token="job",
            join_seconds=20.0,
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
