from __future__ import annotations

import pytest

from opensmp.distributed.watchdog.rank_error import RankError
from opensmp.distributed.watchdog.verdicts.recovery_rounds import Rounds


def fault(rank, text="no row", generation=0, consequence=False):
    error = RankError.of(rank, ValueError(text))._asdict()
    return {"kind": "fault", "generation": generation, "error": error, "consequence": consequence}


def settle(*position, generation=0):
    return {"kind": "settle", "generation": generation, "position": list(position)}


def ready(generation=0):
    return {"kind": "ready", "generation": generation}


@pytest.fixture
def rounds():
    return Rounds(2)


def test_the_first_cause_halts_all_ranks_and_later_ones_say_nothing(rounds):
    (halt,) = rounds.take(1, fault(1), 0.0).tell
    assert (halt["kind"], halt["error"]["rank"]) == ("halt", 1)
    assert rounds.take(0, fault(0), 0.1).tell == ()


def test_a_cause_is_preferred_to_a_consequence_that_came_before(rounds):
    assert rounds.take(0, fault(0, consequence=True), 0.0).tell == ()
    (halt,) = rounds.take(1, fault(1), 0.5).tell
    assert halt["error"]["rank"] == 1
    assert rounds.due(9.0).tell == ()


def test_a_consequence_without_a_cause_becomes_one(rounds):
    rounds.take(0, fault(0, consequence=True), 0.0)
    assert rounds.due(1.0).tell == ()
    (halt,) = rounds.due(2.0).tell
    assert halt["error"]["rank"] == 0


def test_ranks_go_on_when_all_have_left_the_same_call(rounds):
    rounds.take(1, fault(1), 0.0)
    assert rounds.take(1, settle(3), 0.1).tell == ()
    assert [m["kind"] for m in rounds.take(0, settle(3), 0.2).tell] == ["renew"]
    assert rounds.take(0, ready(), 0.3).tell == ()
    assert [m["kind"] for m in rounds.take(1, ready(), 0.4).tell] == ["go"]


@pytest.mark.parametrize("position", [(4,), (3.5,), (3, 1)])
def test_ranks_that_have_left_different_calls_are_lost_and_the_cause_is_named(rounds, position):
    rounds.take(1, fault(1), 0.0)
    rounds.take(1, settle(3), 0.1)
    rank, text = rounds.take(0, settle(*position), 0.2).lost
    assert rank == 1
    assert text.startswith("ValueError: no row")
    assert "rank 0 had already left the call that failed in rank 1" in text


def test_messages_of_an_earlier_round_change_nothing(rounds):
    rounds.take(1, fault(1), 0.0)
    for rank in (0, 1):
        rounds.take(rank, settle(3), 0.1)
    for rank in (0, 1):
        rounds.take(rank, ready(), 0.2)
    assert rounds.take(0, fault(0), 0.3).tell == ()
    (halt,) = rounds.take(0, fault(0, generation=1), 0.4).tell
    assert halt["generation"] == 1
