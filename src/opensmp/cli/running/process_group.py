"""Starts the local ranks of one run, monitors them, and ends all of them together."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from opensmp.cli.running.guardian import Guardian
from opensmp.cli.running.output import Output, Shown, outputs, say, say_of, started
from opensmp.config import LAUNCHER_PREFIX
from opensmp.distributed.watchdog.monitor import ENDED_BY_PEER, PREEMPTED
from opensmp.distributed.watchdog.verdicts.deadlock import listed

GRACE_SECONDS = 20.0
"""Default time that ranks have to exit after a signal."""

_POLL_SECONDS = 0.05
_LEFT_SECONDS = 1.0
_FAILED_SECONDS = 2.0  # time for the other ranks to exit by themselves after one has failed
_TERM_SECONDS = 1.0
_DRAIN_SECONDS = 2.0
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Routine log output of TensorFlow and of opensmp, omitted from the last lines of a failed rank.
_NOISE = re.compile(
    r"WARNING: All log messages before absl|To enable the following instructions|"
    r"opensmp (?:debug|info): |[IW]\d{4} \d\d:|\d{4}-\d\d-\d\d \d\d:\d\d:[\d.]+: [IW] |$"
)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


@dataclass(frozen=True)
class RunResult:
    """Result of a run.

    Attributes:
        exit_code: 0 if all ranks exited with 0, also after a signal; the exit code of the rank that
            failed first; or 128 + n if signal n ended that rank or was forwarded to all ranks.
        failed_rank: The rank that failed first; None if none did.
        signal: The signal that the launcher received; None if it received none.
        seconds: Duration of the run.
        lost: Ranks killed by SIGKILL before the launcher killed any, and the rank that failed first
            if a signal other than a request to exit ended it, such as SIGBUS.
    """

    exit_code: int
    failed_rank: int | None
    signal: int | None
    seconds: float
    lost: tuple[int, ...] = ()


@dataclass
class _Rank:
    """One process and its output."""

    number: int
    process: subprocess.Popen[bytes]
    streams: Mapping[str, Output]
    log: IO[bytes] | None = None
    code: int | None = None
    ended: float = 0.0


class Ranks:
    """Starts a command once per rank and waits for all ranks.

    Args:
        command: The command line.
        environments: The environment of each rank.
        shown: Ranks whose output is shown.
        prefixed: Whether each line has the number of its rank; it has with several ranks shown.
        log_directory: Directory for the full output of each rank; None to write no files.
        appends: Whether to append to existing log files.
        cores: CPU cores of each rank; None for no affinity.
        has_left: Called regularly with each rank that exited with 0 while other ranks run.
        grace_seconds: Time that ranks have to exit after the first forwarded signal.
        first_rank: Number of the first rank that is started here.
    """

    def __init__(
        self,
        command: Sequence[str],
        environments: Sequence[Mapping[str, str]],
        shown: set[int],
        log_directory: Path | None = None,
        appends: bool = False,
        cores: Sequence[set[int]] | None = None,
        has_left: Callable[[int], None] | None = None,
        grace_seconds: float = GRACE_SECONDS,
        first_rank: int = 0,
        prefixed: bool = False,
    ) -> None:
        self._command = list(command)
        self._first_rank = first_rank
        self._environments = environments
        self._shown, self._prefixed = shown, prefixed
        self._log_directory, self._appends = log_directory, appends
        self._cores = cores
        self._has_left = has_left
        self._grace_seconds = grace_seconds
        self._left_told = 0.0
        self._ranks: list[_Rank] = []
        self._selector = selectors.DefaultSelector()
        self._received: list[int] = []

    def run(self) -> RunResult:
        """Runs all ranks; no process of theirs remains when it returns."""
        began = time.monotonic()
        _become_subreaper()
        guardian = Guardian(self._environments[0].get(f"{LAUNCHER_PREFIX}TOKEN"), os.environ)
        others = _children()  # children that this process inherited, e.g. through a shell's exec
        with self._signals():
            try:
                self._start(guardian)
                failed = self._watch()
                lost = tuple(rank.number for rank in self._ranks if _is_lost(rank, failed))
            finally:
                self._end_all(others)
                guardian.dismiss()
                self._drain_all()
                self._selector.close()
                for rank in self._ranks:
                    if rank.log is not None:
                        rank.log.close()
        if failed is not None and not self._received:
            self._tell(failed)
        received = self._received[0] if self._received else None
        code = 0 if failed is None else _shell_code(failed.code)
        ended_well = all(rank.code == 0 for rank in self._ranks)
        return RunResult(
            exit_code=code if received is None or ended_well else 128 + received,
            failed_rank=None if failed is None else failed.number,
            signal=received,
            seconds=time.monotonic() - began,
            lost=lost,
        )

    # ------------------------------------------------------------------------------- start

    def _start(self, guardian: Guardian) -> None:
        for number, environment in enumerate(self._environments, self._first_rank):
            how: Shown = "no"
            if number in self._shown:
                how = "lines" if self._prefixed or len(self._shown) > 1 else "raw"
            streams = outputs(number, how)
            process = started(
                self._command,
                streams,
                env=dict(environment),
                start_new_session=True,  # so that the rank's children can be killed with it
                preexec_fn=_die_with(os.getpid()),
            )
            if self._cores is not None:
                os.sched_setaffinity(process.pid, self._cores[number - self._first_rank])
            guardian.watch(process.pid)
            rank = _Rank(number, process, streams)
            self._ranks.append(rank)
            if self._received:  # a signal arrived during the start
                _signal_group(rank, self._received[-1])
            if self._log_directory is not None:
                path = self._log_directory / f"rank-{number}.log"
                rank.log = open(path, "ab" if self._appends else "wb", buffering=0)  # noqa: SIM115
            for stream in streams.values():
                self._selector.register(stream.reader, selectors.EVENT_READ, (rank, stream))

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Forwards signals to all ranks, except SIGHUP if it is ignored, as under nohup.

        The handler forwards immediately, since the launcher may be blocked, such as in a print to a
        pager. The third signal kills all ranks and exits.
        """

        def receive(number: int, frame: Any) -> None:
            self._received.append(number)
            is_last = len(self._received) > 2
            for rank in self._ranks:
                _signal_group(rank, signal.SIGKILL if is_last else number)
            if is_last:
                os._exit(128 + number)

        is_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        numbers = [n for n in _FORWARDED if not (n == signal.SIGHUP and is_nohup)]
        previous = {number: signal.signal(number, receive) for number in numbers}
        previous[signal.SIGWINCH] = signal.signal(signal.SIGWINCH, self._fit)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _fit(self, number: int, frame: Any) -> None:
        """Follows the size of the terminal."""
        for rank in self._ranks:
            for stream in rank.streams.values():
                stream.fit()

    # ------------------------------------------------------------------------------- watch

    def _watch(self) -> _Rank | None:
        """Waits for all ranks, or until the deadline; returns the rank that failed first."""
        failed: _Rank | None = None
        forwarded = 0
        deadline = None
        while True:
            self._drain()
            ended = [rank for rank in self._ranks if rank.code is None and self._has_ended(rank)]
            failures = [rank for rank in ended if rank.code]
            # Ranks that exit because a peer failed may be observed before that peer.
            own = [rank for rank in failures if rank.code != ENDED_BY_PEER]
            if failed is None or (failed.code == ENDED_BY_PEER and own):
                failed = next(iter(own or failures), failed)
            now = time.monotonic()
            if failures and deadline is None:
                together = failures[0].code == PREEMPTED  # the peers have saved, too
                deadline = now + (self._grace_seconds if together else _FAILED_SECONDS)
            if len(self._received) > forwarded:
                number = self._received[-1]
                say(f"forwarding {signal.Signals(number).name} to all ranks")
                forwarded = len(self._received)
                # A second signal requests an immediate end.
                deadline = now + (self._grace_seconds if forwarded == 1 else 0)
            self._tell_who_left(now)
            have_ended = all(rank.code is not None for rank in self._ranks)
            if have_ended or (deadline is not None and now > deadline):
                return failed

    def _tell_who_left(self, now: float) -> None:
        if self._has_left is None or now < self._left_told + _LEFT_SECONDS:
            return
        self._left_told = now
        left = [rank for rank in self._ranks if rank.code == 0]
        if len(left) < len(self._ranks):
            for rank in left:
                self._has_left(rank.number)

    def _has_ended(self, rank: _Rank) -> bool:
        rank.code, rank.ended = rank.process.poll(), time.monotonic()
        return rank.code is not None

    def _end_all(self, others: set[int]) -> None:
        """Ends all ranks that still run, and all processes that the ranks started."""
        for number, seconds in ((signal.SIGTERM, _TERM_SECONDS), (signal.SIGKILL, 10.0)):
            running = [rank for rank in self._ranks if rank.process.poll() is None]
            for rank in running:
                _signal_group(rank, number)
            end = time.monotonic() + seconds
            while running and time.monotonic() < end:
                self._drain()
                running = [rank for rank in running if rank.process.poll() is None]
        for rank in self._ranks:
            _signal_group(rank, signal.SIGKILL)
            if rank.code is None:
                rank.code = rank.process.poll()
        _end_orphans(others)

    # ------------------------------------------------------------------------------ output

    def _drain(self) -> None:
        """Reads pending output of the ranks; waits at most `_POLL_SECONDS`."""
        if not self._selector.get_map():
            time.sleep(_POLL_SECONDS)
            return
        for key, _ in self._selector.select(_POLL_SECONDS):
            rank, stream = key.data
            data = stream.read()
            if data:
                self._log(rank, data)
                stream.take(data)
            elif data is not None:
                self._selector.unregister(key.fileobj)
                stream.close()

    def _log(self, rank: _Rank, data: bytes) -> None:
        if rank.log is None:
            return
        try:
            rank.log.write(data)
        except OSError as error:
            say(f"the output of rank {rank.number} is no longer written to a file: {error}")
            rank.log.close()
            rank.log = None

    def _drain_all(self) -> None:
        """Reads the remaining output of ranks that have exited."""
        end = time.monotonic() + _DRAIN_SECONDS
        while self._selector.get_map() and time.monotonic() < end:
            self._drain()

    def _tell(self, failed: _Rank) -> None:
        """Prints the failed rank's last lines, after all other output."""
        code = failed.code or 0
        if code == PREEMPTED:
            say(f"rank {failed.number} ended with exit code {code}: it was asked to, start again")
            return
        if code == ENDED_BY_PEER:
            how = "ended because of another rank"
        elif code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
        else:
            how = f"failed with exit code {code}"
        lines = [line for line in failed.streams["stderr"].tail if not _NOISE.match(line)]
        lines = lines or list(failed.streams["stdout"].tail)
        early = [r.number for r in self._ranks if r.code == 0 and r.ended < failed.ended]
        before = f"; {listed(early)} had ended before, with exit code 0" if early else ""
        say(f"rank {failed.number} {how}{before}" + ("; its last lines:" if lines else ""))
        for line in lines:
            say_of(failed.number, line)


# ---------------------------------------------------------------------------------- helpers


def _shell_code(code: int | None) -> int:
    if code is None:
        return 1
    return 128 - code if code < 0 else code


def _is_lost(rank: _Rank, failed: _Rank | None) -> bool:
    """Whether the system killed a rank, as opposed to a crash caused by the first failure."""
    if rank.code is None or rank.code >= 0 or -rank.code in _FORWARDED:
        return False
    return rank is failed or -rank.code == signal.SIGKILL


def _signal_group(rank: _Rank, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(rank.process.pid, number)


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _die_with(parent: int) -> Any:
    """Child setup: the kernel kills the child when the launcher exits (Linux only)."""
    libc = _libc() if sys.platform == "linux" else None

    def prepare() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)

    return prepare


def _become_subreaper() -> None:
    """Makes orphaned descendants of ranks children of the launcher (Linux only)."""
    if sys.platform == "linux":
        _libc().prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _children() -> set[int]:
    """Ids of this process's children."""
    children: set[int] = set()
    for task in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            children |= {int(number) for number in task.read_text().split()}
    return children


def _end_orphans(others: set[int]) -> None:
    """Kills orphaned processes that ranks started in other sessions; spares `others`."""
    for _ in range(10):
        children = _children() - others
        if not children:
            return
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, 0)
