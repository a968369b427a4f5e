"""`opensmp run --hosts`: starts the ranks of several machines from one of them.

On each machine runs `opensmp.cli.running.remote`, which gets its orders as a line of its standard
input: so no secret is on a command line, and nothing has to be quoted twice. When its input ends,
whether this process wants it or is gone, it ends its ranks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from opensmp.base.message_text import sentence, shown
from opensmp.cli.options import checking
from opensmp.cli.running.node import DEFAULT_PORT, Node, address, is_loopback
from opensmp.cli.running.output import say
from opensmp.cli.running.process_group import RunResult
from opensmp.cli.running.restarts import Restarts
from opensmp.cli.running.run_options import MOST_RANKS, RunOptions
from opensmp.config import LAUNCHER_PREFIX
from opensmp.distributed.launch.environment import is_host, parse_address
from opensmp.distributed.watchdog.monitor import ENDED_BY_PEER
from opensmp.errors import LaunchError

_POLL_SECONDS = 0.05
_FAILED_SECONDS = 15.0  # for the other machines to notice by themselves
_KILL_SECONDS = 10.0
_PASSED_ON = ("OPENSMP_", "PYTHON", "TF_", "KERAS_", "XLA_", "CUDA_", "NCCL_", "OMP_")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Host(NamedTuple):
    """A machine and the number of ranks on it."""

    name: str
    ranks: int


def run_on_hosts(options: RunOptions) -> int:
    """Runs all ranks, again after failures if so asked, and returns the exit code."""
    with checking():
        hosts, meeting = _plan(options)
    size = sum(host.ranks for host in hosts)
    secret = os.environ.get(f"{LAUNCHER_PREFIX}TOKEN") or secrets.token_hex(16)
    restarts = Restarts(options.max_restarts, size, None, None)
    while True:
        run = _Run(options, hosts, Node(0, size, meeting, secret), restarts.number)
        outcome = run.run()
        if not restarts.again(outcome, {}):
            return outcome.exit_code


def parse_hosts(text: str, count: int) -> list[Host]:
    """Hosts from `a:4,b:4`; raises a `ValueError` with all faults."""
    hosts: list[Host] = []
    faults: list[str] = []
    for word in text.split(","):
        name, number = word.strip(), str(count)
        if name.startswith("["):
            inside, _, rest = name[1:].partition("]")
            name, number = inside, rest.removeprefix(":") or number
        elif name.count(":") == 1:
            name, _, number = name.partition(":")
        is_number = number.isascii() and number.isdecimal() and 0 < int(number[:9]) <= MOST_RANKS
        if not is_host(name) or name.startswith("-") or not is_number:
            faults.append(f"{shown(word)} is no host with a number of ranks")
        elif name in [host.name for host in hosts]:
            faults.append(f"{shown(name)} is listed twice")
        else:
            hosts.append(Host(name, int(number)))
    if faults:
        raise ValueError(f"{', '.join(faults)}; expected hosts that differ, such as a:4,b:4")
    return hosts


def _plan(options: RunOptions) -> tuple[list[Host], str]:
    """The machines, and where rank 0 listens; raises an error with all faults."""
    faults: list[str] = []
    hosts: list[Host] = []
    meeting = ""
    if options.nnodes > 1 or options.node_rank:
        faults.append("--hosts starts all machines from here; leave out --nnodes and --node-rank")
    if options.min_procs is not None:
        faults.append("--min-procs counts ranks of one machine; leave it out with --hosts")
    if options.min_nodes is not None:
        faults.append("--min-nodes is for --nnodes; leave it out with --hosts")
    try:
        assert options.hosts is not None
        hosts = parse_hosts(options.hosts, options.processes)
        meeting = options.master or address(hosts[0].name, DEFAULT_PORT)
        if len(hosts) > 1 and not options.master and is_loopback(hosts[0].name):
            faults.append(
                f"{hosts[0].name} is each machine itself; expected its name in the network first"
            )
    except ValueError as error:
        faults.append(f"--hosts: {error}")
    if options.master:
        try:
            parse_address(options.master)
        except ValueError as error:
            faults.append(f"--master {error}")
    try:
        if not shlex.split(options.ssh):
            faults.append("--ssh is empty; expected a command, such as ssh")
    except ValueError as error:
        faults.append(f"--ssh {shown(options.ssh)} cannot be read ({error})")
    size = sum(host.ranks for host in hosts)
    if hosts and (options.show_rank or 0) >= size:
        faults.append(f"--show-rank {options.show_rank}: expected 0 to {size - 1}")
    if faults:
        raise LaunchError(f"opensmp run: {sentence(faults)}")
    return hosts, meeting


def _is_here(name: str) -> bool:
    return is_loopback(name) or name == os.uname().nodename


class _Run:
    """One run on all machines."""

    def __init__(
        self, options: RunOptions, hosts: Sequence[Host], whole: Node, restart: int
    ) -> None:
        self._options, self._hosts, self._whole, self._restart = options, hosts, whole, restart
        self._processes: list[subprocess.Popen[bytes]] = []
        self._received: list[int] = []

    def run(self) -> RunResult:
        """Starts all machines and waits for them; none runs any more when it returns."""
        began = time.monotonic()
        with self._signals():
            try:
                self._start()
                failed = self._watch()
            finally:
                self._end_all()
        codes = [process.returncode for process in self._processes]
        received = self._received[0] if self._received else None
        code = 0 if failed is None else codes[failed]
        if failed is not None and received is None:
            name, how = self._hosts[failed].name, f"exit code {code}"
            if code == 255:
                how += f", as {self._options.ssh} ends when it cannot reach a host"
            say(f"{name} ended with {how}")
        if received is not None:
            code = 128 + received if any(codes) else 0
        code = 128 - code if code < 0 else code
        return RunResult(code, failed, received, time.monotonic() - began)

    def _start(self) -> None:
        first = 0
        for host in self._hosts:
            process = subprocess.Popen(
                self._command(host.name), stdin=subprocess.PIPE, start_new_session=True
            )
            self._processes.append(process)
            node = dataclasses.replace(self._whole, first_rank=first)
            with contextlib.suppress(OSError):  # it has ended, which is seen soon
                assert process.stdin is not None
                process.stdin.write(json.dumps(self._orders(node, host.ranks)).encode() + b"\n")
                process.stdin.flush()
            first += host.ranks

    def _command(self, host: str) -> list[str]:
        path = os.environ.get("PYTHONPATH")
        variables = [f"PYTHONPATH={path}"] if path else []
        remote = [sys.executable, "-m", "opensmp.cli.running.remote"]
        inside = f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(['env', *variables, *remote])}"
        if _is_here(host):
            return ["sh", "-c", inside]
        return [*shlex.split(self._options.ssh), host, inside]

    def _orders(self, node: Node, count: int) -> dict[str, Any]:
        options: dict[str, Any] = dataclasses.asdict(self._options)
        own = {"processes": count, "hosts": None, "master": None, "max_restarts": 0}
        folder = None if self._options.log_dir is None else str(self._options.log_dir.absolute())
        return {
            "options": {**options, **own, "log_dir": folder},
            "node": dataclasses.asdict(node),
            "restart": self._restart,
            "environ": _passed_on(os.environ),
        }

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def receive(number: int, frame: Any) -> None:
            self._received.append(number)

        previous = {
            number: signal.signal(number, receive)
            for number in _SIGNALS
            if not (number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN)
        }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _watch(self) -> int | None:
        """Waits until all have ended, or have had time to; the first machine that failed."""
        failed: int | None = None
        deadline = None
        while True:
            codes = [process.poll() for process in self._processes]
            failures = [number for number, code in enumerate(codes) if code]
            own = [number for number in failures if codes[number] != ENDED_BY_PEER]
            if failed is None or (codes[failed] == ENDED_BY_PEER and own):
                failed = next(iter(own or failures), None)
            if failures and deadline is None:
                deadline = time.monotonic() + _FAILED_SECONDS
            ended = all(code is not None for code in codes)
            if ended or self._received or (deadline and time.monotonic() > deadline):
                return failed
            time.sleep(_POLL_SECONDS)

    def _end_all(self) -> None:
        """Ends the input of all, and kills those that go on for longer than they may."""
        for process in self._processes:
            with contextlib.suppress(OSError):
                assert process.stdin is not None
                process.stdin.close()
        end = time.monotonic() + self._options.grace_seconds + _KILL_SECONDS
        for process in self._processes:
            while process.poll() is None and time.monotonic() < end and len(self._received) < 2:
                time.sleep(_POLL_SECONDS)
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _passed_on(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that ranks on other machines get."""
    return {
        name: value
        for name, value in environ.items()
        if name.startswith(_PASSED_ON) and not name.startswith(LAUNCHER_PREFIX)
    }
