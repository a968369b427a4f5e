from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import alive

from opensmp.cli.ranks.guardian import Guardian, belonging

SLEEP = [sys.executable, "-S", "-c", "import time; print(flush=True); time.sleep(600)"]


Process = subprocess.Popen[bytes]


@pytest.fixture
def sleeper() -> Iterator[Callable[..., Process]]:
    """Makes processes that have started and do nothing."""
    made: list[Process] = []

    def make(**options: Any) -> Process:
        made.append(subprocess.Popen(SLEEP, stdout=subprocess.PIPE, **options))
        assert made[-1].stdout is not None
        made[-1].stdout.readline()
        return made[-1]

    yield make
    for process in made:
        process.kill()
        process.communicate()


@pytest.fixture
def guard() -> Iterator[Callable[[str | None], Guardian]]:
    made: list[Guardian] = []

    def make(token: str | None) -> Guardian:
        made.append(Guardian(token, {**os.environ, "OPENSMP_RUN_TOKEN": "of the run around"}))
        return made[-1]

    yield make
    for guardian in made:
        guardian._process.kill()
        guardian._process.communicate()


@pytest.fixture
def token() -> str:
    return secrets.token_hex(8)


def close(guardian: Guardian) -> None:
    """As the system does when the launcher ends, however that happens."""
    assert guardian._process.stdin is not None
    guardian._process.stdin.close()


def ended(processes: list[Process]) -> bool:
    end = time.monotonic() + 120
    while any(process.poll() is None for process in processes) and time.monotonic() < end:
        time.sleep(0.02)
    return all(process.poll() is not None for process in processes)


def test_processes_are_found_by_token_or_session(token, sleeper):
    marked = sleeper(env={"OPENSMP_RUN_TOKEN": token, "OTHER": "x"}, start_new_session=True)
    led = sleeper(env={}, start_new_session=True)
    sleeper(env={"OPENSMP_RUN_TOKEN": token + "0"}, start_new_session=True)
    assert belonging(token, {led.pid}) == sorted([marked.pid, led.pid])
    assert belonging(None, ()) == []
    marked.kill()  # one that has ended, and was not waited for, does not run
    while alive(marked.pid):
        time.sleep(0.01)
    assert belonging(token, ()) == []


def test_the_processes_of_a_launcher_that_was_killed_are_ended_and_no_others(token, sleeper, guard):
    guardian = guard(token)
    marked = sleeper(env={**os.environ, "OPENSMP_RUN_TOKEN": token}, start_new_session=True)
    led, other = sleeper(start_new_session=True), sleeper(start_new_session=True)
    guardian.watch(led.pid)
    close(guardian)
    assert ended([marked, led])
    assert guardian._process.wait(120) == 0
    assert other.poll() is None


def test_a_guardian_that_is_dismissed_ends_nothing(token, sleeper, guard):
    guardian = guard(token)
    marked = sleeper(env={"OPENSMP_RUN_TOKEN": token}, start_new_session=True)
    led = sleeper(start_new_session=True)
    guardian.watch(led.pid)
    guardian.dismiss()
    assert guardian._process.poll() == 0
    assert (marked.poll(), led.poll()) == (None, None)


def test_signals_that_end_all_others_do_not_end_the_guardian(token, sleeper, guard):
    guardian = guard(token)
    marked = sleeper(env={"OPENSMP_RUN_TOKEN": token}, start_new_session=True)
    ignored, end = 0, time.monotonic() + 120
    while not ignored & 1 << signal.SIGTERM - 1 and time.monotonic() < end:  # it still starts
        time.sleep(0.02)
        text = Path(f"/proc/{guardian._process.pid}/status").read_text()
        ignored = next(int(line.split()[1], 16) for line in text.splitlines() if "SigIgn" in line)
    guardian._process.send_signal(signal.SIGTERM)
    close(guardian)
    assert ended([marked])
    assert guardian._process.wait(120) == 0


def test_a_guardian_that_was_killed_is_no_fault_of_the_run(token, guard):
    guardian = guard(token)
    guardian._process.kill()
    guardian._process.wait()
    guardian.watch(1)
    guardian.dismiss()


def test_a_guardian_does_not_belong_to_the_run_around_its_own(guard):
    guard(None)
    assert belonging("of the run around", ()) == []
