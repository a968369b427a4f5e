from __future__ import annotations

import pytest

from opensmp.distributed.watchdog.call_log import CallLog
from opensmp.distributed.watchdog.verdicts.judge import Judge, Verdict, beat_seconds


def judged(judge: Judge, logs: dict[int, CallLog], until: float, begin: float = 0.0):
    """The first conclusion and its time, while the logs are reported at every beat."""
    now = begin
    while now <= until:
        for rank, log in logs.items():
            judge.hear(rank, log.report(), now)
        found = judge.judge(now)
        if found is not None:
            return found, now
        now += beat_seconds(len(logs))
    return None, now


def logs_of(size: int, *inside: int, ended: int | None = None) -> dict[int, CallLog]:
    logs = {rank: CallLog() for rank in range(size)}
    for rank in inside:
        logs[rank].enter("smp.barrier", tuple(range(size)))
    if ended is not None:
        logs[ended].finish()
    return logs


@pytest.mark.parametrize("size", [2, 12, 300])
def test_stuck_ranks_are_confirmed_by_newer_reports(size):
    logs = logs_of(size, *range(size - 1), ended=size - 1)
    found, now = judged(Judge(size, 600.0), logs, 10)
    assert isinstance(found, Verdict)
    assert found.rank == size - 1
    assert 3 < now <= 4
    assert "wait in smp.barrier" in found.text or "waits in smp.barrier" in found.text


def test_stuck_ranks_of_which_nothing_new_is_heard_are_not_confirmed():
    judge, logs = Judge(2, 0.0), logs_of(2, 0, ended=1)
    for rank, log in logs.items():
        judge.hear(rank, log.report(), 0.0)
    assert [judge.judge(now) for now in (0.0, 2.0, 4.0, 8.0)] == [None] * 4
    judge.hear(1, logs[1].report(), 8.5)
    assert isinstance(judge.judge(8.5), Verdict)


def test_a_suspicion_ends_when_something_changes():
    judge, logs = Judge(2, 0.0), logs_of(2, 0, 1)
    assert judged(judge, logs, 2.0)[0] is None
    wait = logs[0].enter("a message", (0, 1), "0>1")
    logs[1].enter("a message", (0, 1), "1>0")
    assert judged(judge, logs, 4.0, begin=2.5)[0] is None
    logs[1].enter("a message", (0, 1), "0>1")
    logs[0].leave(wait)
    assert judged(judge, logs, 30.0, begin=4.5)[0] is None


def test_calls_that_do_not_match_need_no_confirmation():
    logs = logs_of(3, 0, 1)
    logs[2].enter("smp.allgather", (0, 1, 2))
    found, now = judged(Judge(3, 600.0), logs, 10)
    assert now == 0.0
    assert isinstance(found, Verdict)
    assert found.text.startswith("the programs do not match: rank 0 is in smp.barrier, rank 2 came")


def test_run_is_over_when_all_programs_have_ended():
    judge, logs = Judge(2, 600.0), logs_of(2)
    logs[0].finish()
    judged(judge, logs, 1.0)
    assert not judge.all_finished
    logs[1].finish()
    judge.hear(1, logs[1].report(), 2.0)
    assert judge.all_finished


def test_idle_ranks_are_warned_of_and_ended():
    judge, logs = Judge(2, 4.0), logs_of(2)
    for rank in logs:
        logs[rank].enter("the step", (0, 1), computes=True)
    worked = [log.report() for log in logs.values()]
    notices = []
    for beat in range(20):
        for rank, report in enumerate(worked):
            judge.hear(rank, report, beat / 2)
        notices.append(judge.judge(beat / 2))
    assert [(n.ends, i / 2) for i, n in enumerate(notices) if n][:2] == [(False, 2.0), (True, 4.0)]
