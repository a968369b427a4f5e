from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from processes import environ_of_tests

from opensmp.distributed.watchdog.monitor import PREEMPTED
from opensmp.distributed.watchdog.preemption import Boundaries, Preemption


class Wire:
    """Stands for the connections of one rank; messages arrive when the test says so."""

    def __init__(self, rank: int, wires: dict[int, Wire]) -> None:
        self.rank, self.wires = rank, wires
        self.hears = None
        self.waiting: list[tuple[int, dict]] = []
        self.failed: list[tuple[str, int]] = []
        wires[rank] = self

    def send(self, rank, message):
        self.wires[rank].waiting.append((self.rank, message))

    def deliver(self) -> bool:
        waiting, self.waiting = self.waiting, []
        for sender, message in waiting:
            self.hears(sender, message)
        return bool(waiting)

    def fail(self, text, code):
        self.failed.append((text, code))


def ranks(size):
    wires: dict[int, Wire] = {}
    made = [
        Preemption(Wire(rank, wires), rank, size, leave=lambda code: None) for rank in range(size)
    ]
    return made, wires


def deliver_all(wires):
    while sum(wire.deliver() for wire in wires.values()):
        pass


def test_a_boundary_is_passed_at_once_when_nothing_was_asked():
    boundaries = Boundaries()
    assert [boundaries.arrive() for _ in range(3)] == [False] * 3


def test_a_rank_that_is_held_waits_until_it_is_told_where_to_stop():
    boundaries = Boundaries()
    boundaries.arrive()
    assert boundaries.hold() == 1
    found: list[bool] = []
    thread = threading.Thread(
        target=lambda: found.extend([boundaries.arrive(), boundaries.arrive()])
    )
    thread.start()
    thread.join(0.2)
    assert found == []
    boundaries.stop_at(3)
    thread.join(60)
    assert found == [False, True]


@pytest.mark.parametrize("asking", [0, 1, 2])
@pytest.mark.parametrize("passed", [(0, 0, 0), (5, 5, 5), (3, 4, 3), (7, 0, 2)])
def test_all_ranks_stop_at_the_same_boundary_wherever_they_are(asking, passed):
    made, wires = ranks(3)
    for each, count in zip(made, passed, strict=True):
        assert [each.arrive() for _ in range(count)] == [None] * count
    made[asking].ask("SIGTERM", 60.0)
    deliver_all(wires)
    for each, count in zip(made, passed, strict=True):
        left = max(passed) + 1 - count
        assert [each.arrive() for _ in range(left)] == [None] * (left - 1) + ["SIGTERM"]


def test_a_second_signal_and_one_in_each_rank_change_nothing():
    made, wires = ranks(2)
    for each in (*made, *made):
        each.ask("SIGTERM", 60.0)
    deliver_all(wires)
    assert [each.arrive() for each in made] == ["SIGTERM"] * 2


def test_a_rank_that_comes_to_no_boundary_is_ended_in_time():
    wires: dict[int, Wire] = {}
    ended: list[int] = []
    preemption = Preemption(Wire(0, wires), 0, 1, leave=ended.append)
    preemption.ask("SIGTERM", 0.1)
    end = time.monotonic() + 60
    while not ended and time.monotonic() < end:
        time.sleep(0.02)
    assert ended == [PREEMPTED]
    ((text, code),) = wires[0].failed
    assert code == PREEMPTED
    assert "smp.checkpoint_on_preemption(manager) after each step" in text


def test_a_rank_that_saves_is_not_ended_however_long_it_takes():
    ended: list[int] = []
    preemption = Preemption(leave=ended.append)
    preemption.ask("SIGUSR1", 0.2)
    assert preemption.arrive() == "SIGUSR1"
    time.sleep(0.5)
    assert ended == []


FORKS = """
import os, signal, sys, time
from opensmp.distributed.watchdog import preemption
preemption.listen([signal.SIGTERM], 60.0)
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    os.write(writer, b"!")  # Python forgets signals that came while it forked
    time.sleep(60)
    os._exit(0)
os.read(reader, 1)
os.kill(child, signal.SIGTERM)
_, status = os.waitpid(child, 0)
assert os.WTERMSIG(status) == signal.SIGTERM, status
time.sleep(0.3)
assert preemption.arrive() is None
os.kill(os.getpid(), signal.SIGTERM)
end = time.monotonic() + 60
while preemption.arrive() is None and time.monotonic() < end:
    time.sleep(0.02)
preemption.end()
"""


def test_a_signal_to_a_child_that_was_forked_is_none_of_its_parents():
    done = subprocess.run(
        [sys.executable, "-c", FORKS], env=environ_of_tests(), timeout=500, capture_output=True
    )
    assert (done.returncode, done.stderr.decode()) == (PREEMPTED, "")


def test_the_exit_code_is_that_of_a_program_that_sigterm_has_ended():
    assert PREEMPTED == 128 + signal.SIGTERM
    assert os.EX_TEMPFAIL != PREEMPTED  # which is that of a rank that another one has ended
