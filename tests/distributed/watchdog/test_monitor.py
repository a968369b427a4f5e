from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tensorflow as tf
from patience import patient
from processes import check_ranks, launch, run_ranks
from small import MANUAL, STEP_OF_TWO

from opensmp.distributed.channel.channel import Channel
from opensmp.distributed.watchdog import exit_hooks, monitor
from opensmp.distributed.watchdog.call_log import CallLog
from opensmp.distributed.watchdog.monitor import ENDED_BY_PEER, Watch

# Where a process would end, the thread of a test does.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning",
)

# ------------------------------------------------------- watches of ranks that are only threads


class Star:
    """Watches of some ranks in one process; they end by noting an exit code."""

    def __init__(self, size: int) -> None:
        self.records = [CallLog() for _ in range(size)]
        self.codes: dict[int, int] = {}
        ends = [socket.socketpair() for _ in range(1, size)]
        hub = {rank: Channel(pair[0], "t") for rank, pair in enumerate(ends, start=1)}
        links = [Channel(pair[1], "t") for pair in ends]
        self.channels = [*hub.values(), *links]
        self.watches = [Watch(0, hub, self.records[0], leave=self._leave(0))]
        self.watches += [
            Watch(rank, {0: link}, self.records[rank], leave=self._leave(rank))
            for rank, link in enumerate(links, start=1)
        ]
        for watch in self.watches:
            watch.answers = lambda rank, seconds: True
            watch.start()

    def _leave(self, rank: int) -> Callable[[int], None]:
        def leave(code: int) -> None:
            self.codes.setdefault(rank, code)
            raise SystemExit  # of the thread

        return leave

    def wait(self, size: int, seconds: float = 60.0) -> dict[int, int]:
        """Exit codes by rank, once the first `size` ranks have one."""
        end = time.monotonic() + seconds
        while not set(range(size)) <= self.codes.keys() and time.monotonic() < end:
            time.sleep(0.02)
        return dict(sorted(self.codes.items()))


@pytest.fixture
def star() -> Iterator[Callable[[int], Star]]:
    made: list[Star] = []

    def make(size: int) -> Star:
        made.append(Star(size))
        return made[-1]

    yield make
    for one in made:
        for channel in one.channels:
            channel.close()


def background(call: Callable[..., Any], *args: Any, **kwargs: Any) -> threading.Thread:
    def run() -> None:
        with contextlib.suppress(SystemExit):
            call(*args, **kwargs)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_failure_of_one_ends_all_and_keeps_its_exit_code(star, rank, capsys):
    three = star(3)
    background(three.watches[rank].fail, "ValueError: a bug", code=9).join(60)
    codes = three.wait(3)
    assert codes == {other: 9 if other == rank else ENDED_BY_PEER for other in range(3)}
    err = capsys.readouterr().err
    assert err.count(f"ends: rank {rank} failed: ValueError: a bug") == 2


def test_cause_is_preferred_to_its_consequence(star, capsys, monkeypatch):
    monkeypatch.setattr(monitor, "_CAUSE_SECONDS", 60.0)  # it ends when the cause has come
    three = star(3)
    first = background(three.watches[1].fail, "UnavailableError", consequence=True)
    time.sleep(0.3)
    background(three.watches[2].fail, "ValueError: a bug").join(60)
    first.join(60)
    assert three.wait(3) == {0: ENDED_BY_PEER, 1: ENDED_BY_PEER, 2: 1}
    assert "rank 1 ends: rank 2 failed: ValueError: a bug" in capsys.readouterr().err


def test_consequence_without_a_cause_is_one(star, capsys):
    two = star(2)
    background(two.watches[1].fail, "UnavailableError", consequence=True).join(60)
    assert two.wait(2) == {0: ENDED_BY_PEER, 1: 1}
    assert "rank 0 ends: rank 1 failed: UnavailableError" in capsys.readouterr().err


def test_connection_that_closes_is_a_process_that_is_gone(star, capsys):
    three = star(3)
    three.channels[-1].close()  # the end of rank 2
    codes = three.wait(2)
    assert codes[0] == codes[1] == ENDED_BY_PEER
    assert "rank 1 ends: rank 2 failed: it ended without notice" in capsys.readouterr().err


def test_programs_that_end_together_end_well(star):
    three = star(3)
    threads = [background(watch.finish) for watch in three.watches[1:]]
    time.sleep(0.5)
    assert all(thread.is_alive() for thread in threads)  # they wait for rank 0
    last = background(three.watches[0].finish)
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for channel in three.channels[2:]:
        channel.close()  # as the ends of the processes do
    last.join(60)
    assert not last.is_alive()
    assert three.codes == {}


def test_calls_that_do_not_match_end_the_run(star, capsys):
    two = star(2)
    two.records[0].enter("smp.barrier", (0, 1))
    two.records[1].enter("smp.allgather", (0, 1))
    assert two.wait(2) == {0: ENDED_BY_PEER, 1: ENDED_BY_PEER}
    assert "rank 0 is in smp.barrier, rank 1 came to smp.allgather" in capsys.readouterr().err


@pytest.mark.parametrize("size", [12, 101])
def test_many_ranks_end_together_whatever_the_number_of_their_digits(star, capsys, size):
    many = star(size)
    many.records[size - 1].enter("smp.allgather", tuple(range(size)))
    for record in many.records[:-1]:
        record.enter("smp.barrier", tuple(range(size)))
    assert many.wait(size) == dict.fromkeys(range(size), ENDED_BY_PEER)
    err = capsys.readouterr().err
    text = f"rank {size - 1} failed: the programs do not match: rank 0 is in smp.barrier"
    assert err.count(text) == size


def test_many_programs_end_well(star):
    many = star(101)
    threads = [background(watch.finish) for watch in many.watches]
    for thread in threads[1:]:
        thread.join(60)
        assert not thread.is_alive()
    for channel in many.channels[100:]:
        channel.close()
    threads[0].join(60)
    assert not threads[0].is_alive()
    assert many.codes == {}


# ---------------------------------------------------------------------------- real processes

ROWS = """
import ctypes, os, signal, sys, time
import opensmp as smp
row, victim = sys.argv[1], int(sys.argv[2])
smp.init()
smp.barrier()
print("ready", flush=True)
if smp.rank() == victim:
    print("AT", time.time(), flush=True)
    if row == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if row == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    if row == "exception":
        raise ValueError("a bug of the user")
    if row == "exit":
        sys.exit(7)
    if row == "end":
        sys.exit(0)
    if row == "other call":
        smp.allgather(1)
    if row == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    if row == "interrupt":
        import threading
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
        smp.barrier()
    if row == "slow":
        ctypes.PyDLL(None).sleep(10)  # Python stands still: this keeps its lock
elif row == "interrupt":
    time.sleep(60)  # the victim waits for this one when it is interrupted
smp.barrier()
print("done", flush=True)
"""


@pytest.mark.parametrize(
    ("row", "victim", "code", "cause"),
    [
        ("kill", 1, -9, "rank 1 failed: it ended without notice"),
        ("kill", 0, -9, "rank 0 failed: it ended without notice"),
        ("freeze", 1, None, "rank 1 failed: it is frozen"),
        ("freeze", 0, None, "rank 0 failed: it is frozen"),
        ("exception", 1, 1, "rank 1 failed: ValueError: a bug of the user"),
        ("exit", 1, 7, "rank 1 failed: its program ended with exit code 7"),
        ("end", 0, 75, "rank 1 waits in smp.barrier for rank 0; the program of rank 0 has ended"),
        ("other call", 1, 75, "rank 0 is in smp.barrier, rank 1 came to smp.allgather instead"),
        ("term", 1, -15, "rank 1 failed: it ended without notice"),
        ("interrupt", 1, 130, "rank 1 failed: it was interrupted"),
    ],
)
def test_survivor_ends_within_15_seconds_and_names_rank_and_cause(row, victim, code, cause):
    lost = {victim} if row == "freeze" else ()
    results = run_ranks(ROWS, 2, args=[row, victim], lost=lost, fresh=True)
    began = next(float(line[3:]) for line in results[victim].lines if line.startswith("AT "))
    survivor = results[1 - victim]
    assert survivor.code == ENDED_BY_PEER, survivor.output
    assert survivor.at - began < patient(15)
    assert f"opensmp: rank {survivor.rank} ends: " in survivor.output
    assert cause in survivor.output
    if code is not None:
        assert results[victim].code == code


def test_slow_rank_is_waited_for_even_if_its_python_stands_still():
    results = run_ranks(ROWS, 2, args=["slow", 1])
    assert [(result.code, result.lines[-1]) for result in results] == [(0, "done"), (0, "done")]


def test_absent_rank_is_named(tmp_path):
    script = """
    import os, pathlib, sys, time
    rank, folder = os.environ["OPENSMP_RUN_RANK"], pathlib.Path(sys.argv[1])
    if rank == "1":
        time.sleep(6000)
    import opensmp as smp
    smp.init  # imports TensorFlow, which may take one much longer than the other
    (folder / rank).touch()
    while len(list(folder.iterdir())) < 2:
        time.sleep(0.02)
    smp.init()
    """
    results = run_ranks(script, 3, args=[tmp_path], lost={1}, join_seconds=5, fresh=True)
    for rank in (0, 2):
        assert results[rank].code == 1
        assert "rank 1 of 3 did not call smp.init within 5 s" in results[rank].output


# The others wait inside of TensorFlow for a rank that fails between meeting them and joining.
FAILS_AS_IT_STARTS = """
import os, signal, sys, time
import opensmp as smp
from opensmp import _private
how, victim = sys.argv[1], int(sys.argv[2])

def join_cluster(*args, **kwargs):
    time.sleep(2)
    print("AT", time.time(), flush=True)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("no device of this kind")

if int(os.environ["OPENSMP_RUN_RANK"]) == victim:
    _private.join_cluster = join_cluster
smp.init()
"""


@pytest.mark.parametrize(
    ("how", "victim", "cause"),
    [
        ("kill", 1, "rank 1 failed: it ended without notice"),
        ("kill", 0, "rank 0 failed: it ended without notice"),
        ("exception", 2, "RuntimeError: no device of this kind"),
    ],
)
def test_failure_of_a_rank_while_tensorflow_starts_ends_the_others(how, victim, cause):
    results = run_ranks(FAILS_AS_IT_STARTS, 3, args=[how, victim], fresh=True)
    began = next(float(line[3:]) for line in results[victim].lines if line.startswith("AT "))
    assert results[victim].code == (-9 if how == "kill" else 1)
    for survivor in results[:victim] + results[victim + 1 :]:
        assert survivor.code == ENDED_BY_PEER, survivor.output
        assert survivor.at - began < patient(15)
        assert f"opensmp: rank {survivor.rank} ends: rank {victim} failed: " in survivor.output
        assert cause in survivor.output


# A step in which all ranks wait, for ever unless a thread ends it.
WAITING_STEP = f"""
import sys, threading, time
import opensmp as smp
smp.init()
{STEP_OF_TWO}
queue = tf.queue.FIFOQueue(1, [tf.float32], shapes=[()])

@smp.step
def waiting(x):
    return tf.reduce_sum(model(x)) + queue.dequeue()

def compute():
    end = time.monotonic() + float(sys.argv[2])
    while time.monotonic() < end:
        pass
    queue.enqueue(1.0)

if sys.argv[1] == "computes":
    if smp.rank() == 1:
        threading.Thread(target=compute, daemon=True).start()
    else:
        threading.Timer(float(sys.argv[2]), queue.enqueue, (1.0,)).start()
waiting(tf.ones((2, 4)))
print("done", flush=True)
"""


IDLE = r"no rank has computed anything for (\d+) s: ranks 0, 1 in the step"


def test_ranks_that_wait_for_each_other_inside_one_step_are_warned_and_ended():
    flags = ["-n", 2, "-a", "--idle-seconds", 4, "--partitions", 2, "--default-partition", 0]
    result = launch(WAITING_STEP, [*flags, "--no-auto-partition"], args=["idle"])
    assert result.code == ENDED_BY_PEER, result.stderr
    # At half of the limit, and at the limit. A machine that has much else to do looks late.
    for rank in (0, 1):
        warned, ended = (
            re.search(rf"\[{rank}\] opensmp: rank {rank} {what}: {IDLE}", result.stderr)
            for what in ("warns", "ends: rank 0 failed")
        )
        assert warned is not None, result.stderr
        assert ended is not None, result.stderr
        assert 2 <= int(warned[1]) <= int(ended[1])
        assert int(ended[1]) >= 4


def test_step_that_computes_for_longer_than_the_idle_limit_is_waited_for():
    results = check_ranks(
        WAITING_STEP,
        2,
        {**MANUAL, "partitions": 2},
        args=["computes", patient(5)],
        environ={"OPENSMP_IDLE_SECONDS": patient(2)},
    )
    assert [result.lines[-1] for result in results] == ["done", "done"]


@pytest.mark.timeout(60)
def test_causes_in_a_circle_have_an_end():
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first  # as `raise first from second` leaves them
    assert not exit_hooks.is_consequence(first)
    second.__context__ = tf.errors.UnavailableError(None, None, "Socket closed")
    second.__cause__ = None
    assert exit_hooks.is_consequence(first)
