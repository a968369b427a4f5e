from __future__ import annotations

import threading

from opensmp.distributed.watchdog.call_log import RUNNING, WAITING, CallLog, Group


def test_calls_are_counted_by_group():
    record = CallLog()
    for _ in range(2):
        with record.entered("smp.barrier", (0, 1)):
            pass
    with record.entered("smp.allgather", (0, 2)):
        report = record.report()
    assert report.state == "waiting"
    assert report.wait is not None
    assert (report.wait.name, report.wait.number) == ("smp.allgather", 1)
    assert report.entered[Group((0, 1))].number == 2
    assert record.report().state == "running"


def test_innermost_call_is_the_one_that_waits():
    record = CallLog()
    with record.entered("smp.step", (0, 1)):
        with record.entered("smp.allgather", (0, 1)):
            assert record.report().wait.name == "smp.allgather"
        assert record.report().wait.name == "smp.step"


def test_other_threads_are_counted_but_do_not_make_a_process_wait():
    record, inside, go = CallLog(), threading.Event(), threading.Event()

    def call() -> None:
        with record.entered("smp.barrier", (0, 1)):
            inside.set()
            go.wait(5)

    thread = threading.Thread(target=call)
    thread.start()
    inside.wait(5)
    report = record.report()
    go.set()
    thread.join()
    assert report.state == "running"
    assert report.entered[Group((0, 1))].number == 1


def test_moment_changes_with_every_call_and_with_nothing_else():
    record = CallLog()
    wait = record.enter("smp.barrier", (0, 1))
    first = record.report().moment
    record.progress()
    assert record.report().moment == first
    record.leave(wait)
    assert record.report().moment > first


def test_call_that_raises_is_left():
    record = CallLog()
    try:
        with record.entered("smp.barrier", (0, 1)):
            raise OSError
    except OSError:
        pass
    assert record.report().wait is None


def test_finished_program_says_so():
    record = CallLog()
    record.finish()
    assert record.report().state == "finished"


def test_group_is_one_object_for_each_value():
    assert Group((0, 1), "a") is Group(tuple(range(2)), "a")
    assert len({Group((0, 1)), Group((0, 1), "a"), Group((0, 2))}) == 3


def test_calls_of_other_threads_are_told_aside():
    record = CallLog()
    thread = threading.Thread(target=lambda: record.enter("smp.barrier", (0, 1)))
    thread.start()
    thread.join()
    report = record.report()
    assert (report.state, report.wait) == (RUNNING, None)
    assert [call.name for call in report.calls] == ["smp.barrier"]


def test_a_run_that_an_error_has_ended_is_forgotten_at_the_next_call():
    record = CallLog()
    record.enter("the function f", (0, 1), "runs of f", computes=True)
    assert record.report().state == WAITING
    record.leave(record.enter("smp.barrier", (0, 1)))
    assert record.report().state == RUNNING


def test_runs_that_have_ended_by_an_error_are_forgotten():
    record = CallLog()
    record.enter("the step", (0, 1), computes=True)
    record.forget_runs()
    assert record.report().state == "running"


def test_counting_begins_anew_in_groups_of_its_own():
    record = CallLog()
    record.enter("smp.barrier", (0, 1))
    record.begin_anew(1)
    assert record.report().entered == {}
    with record.entered("smp.barrier", (0, 1)):
        (group,) = record.report().entered
    assert group != Group((0, 1))
    assert record.report().entered[group].number == 1
