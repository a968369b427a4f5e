from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from opensmp.distributed.channel.pipes import DIGEST_BYTES, Pipes
from opensmp.errors import CommunicationError


def opened(count: int) -> list[Pipes]:
    pipes = [Pipes(rank) for rank in range(count)]
    offers = [each.offer for each in pipes]
    assert all(each.open(offers) for each in pipes)
    return pipes


def never() -> bool:
    return False


@pytest.mark.parametrize("count", [2, 3, 12])
def test_each_gets_the_digests_of_all_by_rank_however_far_others_are_ahead(count: int) -> None:
    pipes = opened(count)

    def exchange(rank: int) -> list[list[bytes]]:
        found = []
        for turn in range(50):
            if (rank + turn) % 7 == 0:
                time.sleep(0.001)
            digest = bytes([rank, turn]) + bytes(DIGEST_BYTES - 2)
            found.append(pipes[rank].exchange(digest, never))
        return found

    with ThreadPoolExecutor(count) as pool:
        for found in pool.map(exchange, range(count)):
            for turn, digests in enumerate(found):
                assert [digest[:2] for digest in digests] == [
                    bytes([r, turn]) for r in range(count)
                ]
    for each in pipes:
        each.close()


def test_waiting_takes_no_processor_time_and_ends_at_once_when_interrupted() -> None:
    one, two = opened(2)
    interrupted = threading.Event()

    def interrupt() -> None:
        interrupted.set()
        one.wake()

    timer = threading.Timer(0.5, interrupt)
    timer.start()
    began, used = time.monotonic(), time.thread_time()
    with pytest.raises(CommunicationError, match="Another rank has failed"):
        one.exchange(bytes(DIGEST_BYTES), interrupted.is_set)
    assert time.thread_time() - used < 0.05
    assert time.monotonic() - began < 0.95  # sooner than the next look at signals
    timer.join()
    one.close()
    two.close()


def test_a_process_that_has_ended_is_left_to_the_watch() -> None:
    one, two = opened(2)
    two.close()
    interrupted = iter([False, True])
    one.wake()
    with pytest.raises(CommunicationError):
        one.exchange(bytes(DIGEST_BYTES), lambda: next(interrupted))
    one.close()


def test_pipe_of_another_process_of_that_number_is_not_taken() -> None:
    """In another container a process id and a descriptor mean something else."""
    one, two = Pipes(0), Pipes(1)
    offer = two.offer
    assert not one.open([one.offer, offer._replace(inode=offer.inode + 1)])
    one.close()
    gone = Pipes(0)
    assert not gone.open([gone.offer, offer._replace(process=1 << 30)])
    gone.close()
    two.close()


def test_nothing_is_left_open() -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    for each in opened(5):
        each.close()
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_ranks_that_have_met_different_numbers_of_times_are_told() -> None:
    one, two = opened(2)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda each: each.exchange(bytes(DIGEST_BYTES), never), [one, two]))
        two._number += 1
        for waiting in [pool.submit(e.exchange, bytes(DIGEST_BYTES), never) for e in (one, two)]:
            with pytest.raises(CommunicationError, match=r"have met \[2, 3\] times"):
                waiting.result()
    one.close()
    two.close()
