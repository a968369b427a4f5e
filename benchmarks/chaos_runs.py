"""Ranks that are forked, watched, and killed at a moment: what `chaos.py` runs."""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import select
import signal
import socket
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import chaos_ranks
from chaos_ranks import Task
from opensmp.cli.run import environment
from opensmp.distributed.launch.meeting.rendezvous import reserve_port

LIMIT_SECONDS = 240.0  # for a run of all ranks, on a machine that does much else
ALONE_SECONDS = 60.0  # for the other ranks to end after one has failed


@dataclass(frozen=True)
class Kind:
    """What is trained.

    Attributes:
        way: `"manager"` or `"fit"`.
        ranks: Number of processes, each a partition.
    """

    way: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.way}, {self.ranks} ranks"


@dataclass
class Run:
    """How one run of all ranks went.

    Attributes:
        codes: Exit code of each rank, negative for a signal.
        hit: Whether the victim was still running when it was killed.
        saved: Number of steps in the last checkpoint that was reported as saved.
        restored: Number of steps in the checkpoint that the run began with, None if unknown.
        spans: Seconds from each mark of the first rank to its next one.
        ending: Seconds from the kill or the first end of a rank to the end of all.
        hung: Ranks that did not end by themselves.
        output: What all ranks printed.
    """

    codes: list[int]
    hit: bool = False
    saved: int = 0
    restored: int | None = None
    spans: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    ending: float = 0.0
    hung: list[int] = field(default_factory=list)
    output: str = ""


@dataclass(frozen=True)
class Kill:
    """When a rank is killed: a part of the time of a phase after it has begun."""

    rank: int
    phase: str
    occurrence: int
    delay: float


# --------------------------------------------------------------------------------- processes


def start(kind: Kind, folder: Path, rank: int, environ: dict[str, str], fault: str) -> list[int]:
    """Forks a rank; gives its process id and the end of a pipe that its marks come through."""
    reader, writer = os.pipe()
    process = os.fork()
    if process:
        os.close(writer)
        return [process, reader]
    code = 1
    try:
        os.setsid()
        os.environ.clear()
        os.environ.update(environ)
        output = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        mark: Callable[[str], None] = lambda text: _tell(writer, text)  # noqa: E731
        chaos_ranks.run(Task(kind.way, kind.ranks, folder, fault, mark))
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    _finish(code)
    return []


def _finish(code: int) -> None:
    """Ends a forked process as Python ends one, with the functions of `atexit`."""
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _tell(writer: int, text: str) -> None:
    os.write(writer, f"{text}\n".encode())


def run(
    kind: Kind,
    folder: Path,
    kill: Kill | None = None,
    fault: str = "",
    victim: int = 0,
    port_taken: bool = False,
) -> Run:
    """Starts all ranks and waits for their end.

    Args:
        kind: What is trained.
        folder: Of the checkpoints.
        kill: Which rank is killed, and when.
        fault: What goes wrong in rank `victim`, for which nothing is killed.
        victim: See `fault`.
        port_taken: Whether another program listens where the ranks are to meet.
    """
    token = secrets.token_hex(8)
    with contextlib.ExitStack() as stack:
        if port_taken:
            other = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            port = other.getsockname()[1]
        else:
            reservation, port = reserve_port("127.0.0.1")
            stack.enter_context(reservation)
        ranks = {}
        for rank in range(kind.ranks):
            environ = environment(
                os.environ,
                rank=rank,
                size=kind.ranks,
                port=port,
                token=token,
                flags={},
                join_seconds=30.0,  # for a rank 0 that is gone, without a launcher to tell
            )
            process, reader = start(kind, folder, rank, environ, fault if rank == victim else "")
            ranks[rank] = (process, reader)
        outcome = _watch(ranks, kill)
    texts = [(folder / f"rank-{rank}.log").read_text(errors="replace") for rank in ranks]
    outcome.output = "\n".join(f"--- rank {r}\n{text}" for r, text in enumerate(texts))
    return outcome


def _watch(ranks: dict[int, tuple[int, int]], kill: Kill | None) -> Run:
    outcome = Run([0] * len(ranks))
    began = time.monotonic()
    readers = {reader: rank for rank, (_, reader) in ranks.items()}
    waiting, running = dict(readers), {process: rank for rank, (process, _) in ranks.items()}
    seen: Counter[str] = Counter()
    last: tuple[str, float] | None = None
    due: float | None = None
    first_end: float | None = None
    while running:
        now = time.monotonic()
        late = now - began > LIMIT_SECONDS
        if late or (first_end is not None and now - first_end > ALONE_SECONDS):
            outcome.hung = sorted(running.values())
            for process in running:
                os.kill(process, signal.SIGKILL)
        if due is not None and now >= due:
            assert kill is not None
            process = ranks[kill.rank][0]
            if process in running:
                os.kill(process, signal.SIGKILL)
                outcome.hit = True
                first_end = now
            due = None
        pause = 0.02 if due is None else max(0.0, min(0.02, due - now))
        for reader in select.select(list(waiting), [], [], pause)[0]:
            data = os.read(reader, 1 << 16)
            if not data:
                del waiting[reader]
                continue
            for text in data.decode().splitlines():
                word, _, number = text.partition(" ")
                if readers[reader] == 0:
                    if last is not None:
                        outcome.spans[last[0]].append(time.monotonic() - last[1])
                    last = word, time.monotonic()
                    if word == "saved":
                        outcome.saved = int(number)
                    if word == "restored":
                        outcome.restored = int(number)
                if kill is not None and readers[reader] == kill.rank and word == kill.phase:
                    seen[word] += 1
                    if seen[word] == kill.occurrence:
                        due = time.monotonic() + kill.delay
                if word == "broken":
                    first_end = time.monotonic()
                    # A rank that is stopped never ends.
                    running.pop(ranks[readers[reader]][0], None)
        for process, rank in list(running.items()):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                outcome.codes[rank] = os.waitstatus_to_exitcode(status)
                del running[process]
                if first_end is None and outcome.codes[rank]:
                    first_end = time.monotonic()
    if first_end is not None:
        outcome.ending = time.monotonic() - first_end
    for process, reader in ranks.values():
        os.close(reader)
        with contextlib.suppress(ProcessLookupError, ChildProcessError, PermissionError):
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
    return outcome
