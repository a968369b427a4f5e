"""Failures of the network between two machines, which are network namespaces of this one."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from machines import Machines, machines_or_skip
from patience import patient
from processes import environ_of_tests

from opensmp.distributed.watchdog.monitor import ENDED_BY_PEER

SCRIPT = """
import os, signal, sys, time
import opensmp as smp
smp.init({"partitions": 1})
smp.barrier()
print("READY", flush=True)
if sys.argv[1] == "freeze" and smp.rank() == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
end = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    time.sleep(0.1)
smp.barrier()
print("END", flush=True)
"""


def run(
    event: Callable[[Machines], None], *args: object, survivors: int = 2
) -> tuple[list[int | None], list[str], float, list[str]]:
    """What becomes of two ranks, each on a machine of its own, after an event.

    Exit codes and errors of both, the seconds from the event to the end of the first one, and the
    names of the machines.
    """
    with machines_or_skip() as machines:
        Path(machines.folder, "script.py").write_text(SCRIPT)
        processes = []
        for rank in (0, 1):
            environ = environ_of_tests(
                {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": machines.addresses[0],
                 "MASTER_PORT": 29571, "OPENSMP_RUN_TOKEN": "x"}
            )  # fmt: skip
            command = [sys.executable, "script.py", *args]
            with Path(machines.folder, f"err{rank}").open("w") as errors:
                processes.append(machines.start(rank, command, environ, errors=errors))
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "READY\n"
        time.sleep(1.0)
        event(machines)
        began = time.monotonic()
        for process in processes[:survivors]:
            process.wait(patient(60))
        seconds = time.monotonic() - began
        for process in processes:
            process.kill()
            process.communicate()
        errors_of = [Path(machines.folder, f"err{rank}").read_text() for rank in (0, 1)]
        codes = [process.returncode for process in processes]
        return codes, errors_of, seconds, machines.names


def test_interrupted_network_is_named_by_both_sides():
    codes, errors, seconds, (zero, one) = run(lambda machines: machines.cut(1), "wait", 100)
    assert codes == [ENDED_BY_PEER, ENDED_BY_PEER], errors
    assert seconds < patient(12)
    assert f"rank 0 ends: rank 0 on {zero} and rank 1 on {one} cannot hear each other" in errors[0]
    assert f"rank 1 ends: rank 1 on {one} and rank 0 on {zero} cannot hear each other" in errors[1]
    assert "frozen" not in errors[0] + errors[1]


@pytest.mark.parametrize("number", [0, 1])
def test_network_of_one_direction_is_no_frozen_process(number):
    codes, errors, seconds, _ = run(
        lambda machines: machines.lose_what_is_sent_by(number, 1 - number), "wait", 100
    )
    assert codes == [ENDED_BY_PEER, ENDED_BY_PEER], errors
    assert seconds < patient(20)
    assert all("is interrupted" in text for text in errors)
    assert "frozen" not in errors[0] + errors[1]


def test_frozen_process_of_another_machine_is_no_interrupted_network():
    codes, errors, seconds, _ = run(lambda machines: None, "freeze", 100, survivors=1)
    assert codes[0] == ENDED_BY_PEER, errors
    assert seconds < patient(12)
    assert "rank 0 ends: rank 1 failed: it is frozen" in errors[0]
    assert "while its machine acknowledges what it is sent" in errors[0]


def test_short_interruption_is_survived():
    def interrupt(machines: Machines) -> None:
        machines.cut(1)
        time.sleep(3.5)
        machines.plug(1)

    codes, errors, *_ = run(interrupt, "wait", 15)
    assert codes == [0, 0], errors
