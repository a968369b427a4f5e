"""Runs shell commands two at a time, and prints the output of each when it has ended.

    python scripts/two_at_a_time.py --minutes 10 "python examples/digits.py" "mkdocs build"

After a failure no further command is started. The exit status is that of the first one that
failed; 124 if it ran for longer than it may.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

AT_A_TIME = 2

_running: set[int] = set()


def run(command: str, seconds: float) -> tuple[int, str]:
    """Runs a command; returns its exit status and its output. Ends its children with it."""
    process = subprocess.Popen(
        ["bash", "-c", command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    _running.add(process.pid)
    try:
        output, _ = process.communicate(timeout=seconds)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return 124, f"{output}\nstill running after {seconds:g} s"
    finally:
        _running.discard(process.pid)


def end_all(number: int, _: object) -> None:
    """Ends what runs, and this process as the signal would."""
    for pid in list(_running):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    os._exit(128 + number)


def run_all(commands: Sequence[str], seconds: float, at_a_time: int = AT_A_TIME) -> int:
    """Runs commands; returns the exit status of the first one that failed, or 0.

    Args:
        commands: Shell commands.
        seconds: How long each may take.
        at_a_time: How many run at the same time.
    """
    left: queue.SimpleQueue[str] = queue.SimpleQueue()
    for command in commands:
        left.put(command)
    failures: list[int] = []
    printing = threading.Lock()

    def work() -> None:
        while not failures:
            try:
                command = left.get_nowait()
            except queue.Empty:
                return
            began = time.monotonic()
            status, output = run(command, seconds)
            verdict = "passed" if status == 0 else f"failed (exit {status})"
            with printing:
                print(f"\n--> {command}\n{output.rstrip()}")
                print(f"--> {verdict} in {time.monotonic() - began:.0f} s", flush=True)
            if status:
                failures.append(status)

    workers = [threading.Thread(target=work) for _ in range(at_a_time)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return failures[0] if failures else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("commands", nargs="+", metavar="COMMAND")
    parser.add_argument("--minutes", type=float, default=10, help="how long each may take")
    arguments = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end_all)
    return run_all(arguments.commands, 60 * arguments.minutes)


if __name__ == "__main__":
    sys.exit(main())
