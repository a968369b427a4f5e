"""Failures of the network between two machines, which are network namespaces of this one."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
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


def ip(*words: object) -> None:
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True)


class Hosts:
    """Two namespaces that are joined by a cable."""

    def __init__(self) -> None:
        tag = f"{os.getpid() % 100_000}"
        self.names = [f"smp{tag}h{number}" for number in (0, 1)]
        self.cards = [f"sv{tag}c{number}" for number in (0, 1)]

    def __enter__(self) -> Hosts:
        for name in self.names:
            ip("netns", "add", name)
        zero, one = self.names
        ip("link", "add", self.cards[0], "netns", zero, "type", "veth",
           "peer", "name", self.cards[1], "netns", one)  # fmt: skip
        for number, name in enumerate(self.names):
            ip("-n", name, "addr", "add", f"10.79.0.{number + 1}/24", "dev", self.cards[number])
            ip("-n", name, "link", "set", self.cards[number], "up")
            ip("-n", name, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)

    def cut(self) -> None:
        """Takes the cable out."""
        ip("-n", self.names[1], "link", "set", self.cards[1], "down")

    def plug(self) -> None:
        ip("-n", self.names[1], "link", "set", self.cards[1], "up")

    def lose_what_is_sent_by(self, number: int) -> None:
        """Makes a host send to a card that is not there."""
        ip("-n", self.names[number], "neigh", "replace", f"10.79.0.{2 - number}", "lladdr",
           "02:00:00:00:00:99", "dev", self.cards[number], "nud", "permanent")  # fmt: skip


@pytest.fixture(scope="module")
def hosts() -> Hosts:
    made = Hosts()
    try:
        made.__enter__()
    except (OSError, subprocess.CalledProcessError) as error:
        made.__exit__()
        pytest.skip(f"network namespaces cannot be made here: {error}")
    made.__exit__()
    return made


def run(
    hosts: Hosts, event: Callable[[], None], *args: object, survivors: int = 2
) -> tuple[list[int | None], list[str], float]:
    """Exit codes and errors of both ranks, and the seconds from an event to the first one's end."""
    with hosts, tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "script.py")
        path.write_text(SCRIPT)
        processes = []
        for rank, name in enumerate(hosts.names):
            environ = {
                **environ_of_tests({}), "RANK": str(rank), "WORLD_SIZE": "2",
                "MASTER_ADDR": "10.79.0.1", "MASTER_PORT": "29571", "OPENSMP_RUN_TOKEN": "x",
            }  # fmt: skip
            inside = f"hostname {name}; exec {sys.executable} {path} {' '.join(map(str, args))}"
            command = ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", inside]
            with Path(folder, f"err{rank}").open("w") as errors:
                processes.append(
                    subprocess.Popen(
                        command, env=environ, stdout=subprocess.PIPE, stderr=errors, text=True
                    )
                )
        try:
            for process in processes:
                assert process.stdout is not None
                assert process.stdout.readline() == "READY\n"
            time.sleep(1.0)
            event()
            began = time.monotonic()
            for process in processes[:survivors]:
                process.wait(patient(60))
            seconds = time.monotonic() - began
        finally:
            for process in processes:
                process.kill()
                process.communicate()
        errors_of = [Path(folder, f"err{rank}").read_text() for rank in (0, 1)]
        return [process.returncode for process in processes], errors_of, seconds


def test_interrupted_network_is_named_by_both_sides(hosts):
    codes, errors, seconds = run(hosts, hosts.cut, "wait", 100)
    assert codes == [ENDED_BY_PEER, ENDED_BY_PEER], errors
    assert seconds < patient(12)
    zero, one = hosts.names
    assert f"rank 0 ends: rank 0 on {zero} and rank 1 on {one} cannot hear each other" in errors[0]
    assert f"rank 1 ends: rank 1 on {one} and rank 0 on {zero} cannot hear each other" in errors[1]
    assert "frozen" not in errors[0] + errors[1]


@pytest.mark.parametrize("number", [0, 1])
def test_network_of_one_direction_is_no_frozen_process(hosts, number):
    codes, errors, seconds = run(
        hosts, lambda: hosts.lose_what_is_sent_by(number), "wait", 100
    )  # fmt: skip
    assert codes == [ENDED_BY_PEER, ENDED_BY_PEER], errors
    assert seconds < patient(20)
    assert all("is interrupted" in text for text in errors)
    assert "frozen" not in errors[0] + errors[1]


def test_frozen_process_of_another_machine_is_no_interrupted_network(hosts):
    codes, errors, seconds = run(hosts, lambda: None, "freeze", 100, survivors=1)
    assert codes[0] == ENDED_BY_PEER, errors
    assert seconds < patient(12)
    assert "rank 0 ends: rank 1 failed: it is frozen" in errors[0]
    assert "while its machine acknowledges what it is sent" in errors[0]


def test_short_interruption_is_survived(hosts):
    def interrupt() -> None:
        hosts.cut()
        time.sleep(3.5)
        hosts.plug()

    codes, errors, _ = run(hosts, interrupt, "wait", 15)
    assert codes == [0, 0], errors
