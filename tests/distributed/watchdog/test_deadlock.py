from __future__ import annotations

import threading
from collections.abc import Callable

from opensmp.distributed.watchdog.call_log import CallLog, Report
from opensmp.distributed.watchdog.deadlock import find_mismatch, find_stuck


def ranks(*programs: Callable[[CallLog], object]) -> dict[int, Report]:
    """Reports of ranks that have run so far."""
    reports = {}
    for rank, program in enumerate(programs):
        record = CallLog()
        program(record)
        reports[rank] = record.report()
    return reports


def calls(*names: str, group: tuple[int, ...] = (0, 1), inside: bool = True):
    """Enters calls one after the other, and stays inside the last one."""

    def program(record: CallLog) -> None:
        for name in names[: len(names) - inside]:
            record.leave(record.enter(name, group))
        if inside:
            record.enter(names[-1], group)

    return program


def message(begin: int, end: int):
    def program(record: CallLog) -> None:
        record.enter(
            f"a message from rank {begin} to rank {end}",
            (min(begin, end), max(begin, end)),
            f"{begin}>{end}",
        )

    return program


def running(record: CallLog) -> None:
    pass


def ended(record: CallLog) -> None:
    record.finish()


def test_rank_that_runs_may_still_come():
    assert find_stuck(ranks(calls("smp.barrier"), running)) is None
    assert find_mismatch(ranks(calls("smp.barrier"), running)) is None


def test_matching_calls_are_no_fault():
    assert find_stuck(ranks(calls("smp.barrier"), calls("smp.barrier"))) is None
    assert find_mismatch(ranks(calls("smp.barrier"), calls("smp.barrier"))) is None


def test_rank_that_is_ahead_agrees_about_the_past():
    reports = ranks(calls("a", "b"), calls("a", "b", "c"))
    assert find_mismatch(reports) is None
    assert find_stuck(reports) is None  # the call `b` has everybody


def test_other_call_in_the_same_place_is_a_mismatch():
    finding = find_mismatch(ranks(calls("a", "smp.barrier"), calls("a", "smp.allgather")))
    assert finding is not None
    assert finding.rank == 1
    assert finding.text.startswith(
        "rank 0 is in smp.barrier, rank 1 came to smp.allgather instead, each as call 2 of "
        "ranks 0, 1"
    )


def test_waiting_for_a_program_that_has_ended_is_stuck_and_names_it():
    finding = find_stuck(ranks(calls("smp.barrier"), ended))
    assert finding is not None
    assert finding.rank == 1
    assert finding.text == (
        "rank 0 waits in smp.barrier for rank 1; the program of rank 1 has ended"
    )


def test_program_that_ended_after_the_call_is_not_waited_for():
    def both(record: CallLog) -> None:
        calls("smp.step", inside=False)(record)
        record.finish()

    assert find_stuck(ranks(calls("smp.step"), both)) is None


def test_messages_in_both_directions_are_a_circle():
    finding = find_stuck(ranks(message(0, 1), message(1, 0)))
    assert finding is not None
    assert "rank 0 waits in a message from rank 0 to rank 1 for rank 1" in finding.text
    assert "rank 1 waits in a message from rank 1 to rank 0 for rank 0" in finding.text
    assert find_stuck(ranks(message(0, 1), message(0, 1))) is None


def test_circle_over_groups_names_the_one_that_is_somewhere_else():
    world = (0, 1, 2)
    finding = find_stuck(
        ranks(message(1, 0), calls("smp.barrier", group=world), calls("smp.barrier", group=world))
    )
    assert finding is not None
    assert finding.rank == 0


def test_waiting_for_one_who_waits_for_a_running_rank_is_patience():
    reports = ranks(message(0, 1), message(1, 2), running)
    assert find_stuck(reports) is None
    reports[2] = ranks(ended)[0]
    finding = find_stuck(reports)
    assert finding is not None
    assert finding.rank == 2
    assert [rank for rank, _ in finding.moments] == [0, 1, 2]


def test_rank_that_has_not_been_heard_of_counts_as_running():
    assert find_stuck({0: ranks(calls("smp.barrier"))[0]}) is None


def test_other_calls_in_threads_are_a_mismatch():
    def in_a_thread(name: str) -> Callable[[CallLog], object]:
        def program(record: CallLog) -> None:
            thread = threading.Thread(target=lambda: record.enter(name, (0, 1)))
            thread.start()
            thread.join()

        return program

    finding = find_mismatch(ranks(in_a_thread("smp.barrier"), in_a_thread("smp.allgather")))
    assert "rank 0 is in smp.barrier, rank 1 came to smp.allgather instead" in finding.text


def test_who_waits_inside_a_run_may_be_computing():
    def run(record: CallLog) -> None:
        record.enter("the function f", (0, 1), "runs of f", computes=True)

    assert find_stuck(ranks(run, ended)).computing == (0,)
    assert find_stuck(ranks(calls("smp.barrier"), ended)).computing == ()
