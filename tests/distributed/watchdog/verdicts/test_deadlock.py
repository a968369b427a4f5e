from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping

import pytest

from opensmp.distributed.watchdog.call_log import FINISHED, RUNNING, CallLog, Report, Wait
from opensmp.distributed.watchdog.verdicts.deadlock import find_mismatch, find_stuck, listed


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


# ----------------------------------------------------------- against the definitions, as written


def random_world(rng: random.Random) -> dict[int, Report]:
    """Reports of a few ranks that have entered calls of random groups, mostly in the same order."""
    size = rng.randint(2, 12)
    groups = [tuple(range(size))]
    groups += [tuple(sorted(rng.sample(range(size), rng.randint(1, size)))) for _ in range(3)]
    script = [
        (rng.choice("abc"), rng.choice(groups), rng.choice(("", "", "lane")))
        for _ in range(rng.randint(1, 12))
    ]
    reports = {}
    for rank in range(size):
        record = CallLog()
        faulty = rng.random() < 0.15
        own = [call for call in script if rank in call[1]]
        begun = own[: rng.randint(0, len(own))] if rng.random() < 0.6 else own
        for index, (name, group, lane) in enumerate(begun):
            other = rng.choice("abc") if faulty else name
            wait = record.enter(other, group, lane, computes=rng.random() < 0.3)
            if index < len(begun) - 1 and rng.random() < 0.95:
                record.leave(wait)
        if rng.random() < 0.3:
            record.forget_runs()
        if rng.random() < 0.15:
            record.finish()
        if rng.random() < 0.95:
            reports[rank] = record.report()
    return reports


def has_mismatch(reports: Mapping[int, Report]) -> tuple[int, int] | None:
    """The first rank, and the first other one, with different names for one call."""
    for rank, report in sorted(reports.items()):
        for wait in report.calls:
            for other in wait.group.ranks:
                done = reports[other].entered.get(wait.group) if other in reports else None
                if done is None or not 0 <= done.number - wait.number < len(done.names):
                    continue
                if done.names[wait.number - done.number - 1] != wait.name:
                    return rank, other
    return None


def who_is_stuck(reports: Mapping[int, Report]) -> set[int]:
    """The ranks that are left when those that can go on are removed until there are none."""

    def has_come(rank: int, wait: Wait) -> bool:
        done = reports[rank].entered.get(wait.group)
        return done is not None and done.number >= wait.number

    left = {rank for rank, report in reports.items() if report.state != RUNNING}
    while True:
        go_on = {
            rank
            for rank in left
            if reports[rank].state != FINISHED
            and not any(o in left and not has_come(o, w) for w, o in needed(reports, rank))
        }
        if not go_on:
            return {rank for rank in left if reports[rank].state != FINISHED}
        left -= go_on


def needed(reports: Mapping[int, Report], rank: int) -> list[tuple[Wait, int]]:
    """The call that a rank waits in, with each rank that it needs."""
    wait = reports[rank].wait
    return [] if wait is None else [(wait, other) for other in wait.group.ranks]


@pytest.mark.parametrize("seed", range(300))
def test_findings_are_those_of_the_definitions(seed):
    reports = random_world(random.Random(seed))
    mismatch, expected = find_mismatch(reports), has_mismatch(reports)
    assert (mismatch is None) == (expected is None)
    if mismatch is not None and expected is not None:
        assert mismatch.rank == expected[1]
        assert mismatch.text.startswith(f"rank {expected[0]} is in ")
    stuck = find_stuck(reports)
    ended = {rank for rank, report in reports.items() if report.state == FINISHED}
    assert (stuck is None) == (not who_is_stuck(reports))
    if stuck is not None:
        assert {rank for rank, _ in stuck.moments} - ended == who_is_stuck(reports)
        assert all(moment == reports[rank].moment for rank, moment in stuck.moments)


def test_time_of_a_judgement_grows_with_the_number_of_ranks():
    def seconds(size: int) -> float:
        world = tuple(range(size))
        reports = ranks(*[calls("smp.barrier", group=world)] * (size - 1), ended)
        begin = time.process_time()
        for _ in range(5):
            assert find_mismatch(reports) is None
            assert find_stuck(reports) is not None
        return time.process_time() - begin

    seconds(64)
    assert seconds(2048) < 4 * 16 * max(seconds(128), 1e-3)  # with its square it would be 256


def test_message_about_a_thousand_ranks_is_short():
    world = tuple(range(1024))
    finding = find_stuck(ranks(*[calls("smp.barrier", group=world)] * 1023, ended))
    assert finding is not None
    assert finding.text == (
        "ranks 0 to 1022 wait in smp.barrier for rank 1023; the program of rank 1023 has ended"
    )
    other = find_mismatch(
        ranks(*[calls("smp.barrier", group=world)] * 1023, calls("smp.allgather", group=world))
    )
    assert other is not None
    assert other.text.startswith("rank 0 is in smp.barrier, rank 1023 came to smp.allgather")
    assert "as call 1 of ranks 0 to 1023;" in other.text


def test_many_ranks_are_listed_by_their_runs():
    assert listed([3]) == "rank 3"
    assert listed([0, 1]) == "ranks 0, 1"
    assert listed([*range(10), *range(11, 30)]) == "ranks 0 to 9, 11 to 29"
    assert listed(range(0, 100, 2)).endswith(" 28, 30 and 34 more")
