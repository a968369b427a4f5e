from __future__ import annotations

from collections.abc import Callable

import pytest

from opensmp.distributed.watchdog.call_log import FINISHED, RUNNING, WAITING, Group, Report, Wait
from opensmp.distributed.watchdog.verdicts.stalls import Idleness

STEP = Wait(Group((0, 1)), 3, "the step train")
IDLE = Report(WAITING, 5, STEP, {}, worked=1.0)


def hear(
    idleness: Idleness,
    *programs: Callable[[float], Report | None],
    until: float,
    begin: float = 0.0,
    every: float = 0.5,
) -> list[tuple[float, bool, str]]:
    """What is said while each rank reports; a program says what its rank reports at a time."""
    said = []
    for beat in range(round((until - begin) / every) + 1):
        now = begin + beat * every
        for rank, program in enumerate(programs):
            report = program(now)
            if report is not None:
                idleness.hear(rank, report, now)
        notice = idleness.notice()
        if notice is not None:
            said.append((now, notice.ends, notice.text))
            if notice.ends:
                break
    return said


def idle(now: float) -> Report:
    return IDLE._replace(worked=1.0 + 0.003 * now)  # as TensorFlow's threads do


def test_ranks_that_do_nothing_are_warned_and_then_ended():
    (warned, ends, text), (ended, ends_now, verdict) = hear(Idleness(2), idle, idle, until=700)
    assert (ends, ends_now) == (False, True)
    assert 60 <= warned <= 66
    assert 600 <= ended <= 606
    assert text.startswith("no rank has computed anything for 60 s: ranks 0, 1 in the step train")
    assert "Runs end after 600 s of this; `opensmp run --idle-seconds N`" in text
    assert verdict.startswith("no rank has computed anything for 600 s: ranks 0, 1 in")


def test_short_limit_warns_at_its_half():
    (warned, _, _), (ended, ends, _) = hear(Idleness(2, 4), idle, idle, until=10)
    assert (warned, ended, ends) == (2.0, 4.0, True)


def test_what_waking_up_takes_is_not_computing_however_short_the_limit():
    def waking(now: float) -> Report:
        return IDLE._replace(worked=1.0 + 0.03 * now)

    *_, (ended, ends, _) = hear(Idleness(2, 4), waking, waking, until=10)
    assert (ended, ends) == (4.0, True)


def test_no_limit_still_warns_once():
    ((warned, ends, text),) = hear(Idleness(2, 0), idle, idle, until=2000)
    assert not ends
    assert 60 <= warned <= 66
    assert "no limit is set" in text


@pytest.mark.parametrize(
    "other",
    [
        lambda now: IDLE._replace(worked=0.03 * now),  # 3 % of a core
        lambda now: IDLE._replace(worked=0.2 * (now // 50)),  # rarely, but then it computes
        lambda now: IDLE._replace(faults=int(now // 50)),  # it is swapped in
        lambda now: IDLE._replace(moment=int(now // 50)),  # short steps
        lambda now: IDLE._replace(state=RUNNING, wait=None),  # `input()`
        lambda now: None,  # nothing was heard of it yet
        lambda now: None if now % 50 > 30 else IDLE,  # stopped and continued
    ],
    ids=["slow", "bursts", "swapped", "steps", "running", "unheard", "stopped"],
)
@pytest.mark.parametrize("first", [True, False])
def test_one_rank_that_may_get_on_is_waited_for(other, first):
    programs = (other, idle) if first else (idle, other)
    assert hear(Idleness(2), *programs, until=2000) == []


def test_all_ranks_stopped_together_have_not_been_idle():
    idleness = Idleness(2)
    assert hear(idleness, idle, idle, until=50) == []
    assert hear(idleness, idle, idle, begin=5000, until=5050) == []


def test_a_new_period_is_warned_of_again():
    idleness = Idleness(2, 0)
    assert len(hear(idleness, idle, idle, until=100)) == 1
    assert hear(idleness, lambda now: IDLE._replace(worked=now), idle, begin=101, until=120) == []
    assert len(hear(idleness, idle, idle, begin=121, until=300)) == 1


def test_only_the_time_counts_in_which_all_are_idle_at_once():
    def turns(own: int) -> Callable[[float], Report]:
        return lambda now: IDLE._replace(worked=now if now // 50 % 2 == own else 0.0)

    def ends(now: float) -> Report:
        return IDLE._replace(moment=6, state=FINISHED) if now > 100 else IDLE._replace(worked=now)

    assert hear(Idleness(2), turns(0), turns(1), until=2000) == []
    ((warned, _, _),) = hear(Idleness(2), idle, ends, until=200)
    assert 160 <= warned <= 166


def test_rank_whose_program_has_ended_does_not_count_as_active():
    ended = IDLE._replace(state=FINISHED, wait=None)
    (_, ends, text), *_ = hear(Idleness(2), idle, lambda now: ended, until=100)
    assert not ends
    assert "rank 0 in the step train, rank 1 at the end of the program" in text
    assert hear(Idleness(2), lambda now: ended, lambda now: ended, until=2000) == []
