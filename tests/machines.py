"""Several machines on this one: network namespaces with host names of their own.

    with Machines(2) as machines:
        processes = [machines.start(n, [sys.executable, "x.py"], environ) for n in range(2)]
        machines.cut(1)

All processes in the namespaces are ended when the block ends.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import pytest

LINK = Path(__file__).with_name("delayed_link.py")
_SECONDS_TO_END = 20.0


def ip(*words: object) -> str:
    """Runs a command of `ip` and returns what it prints."""
    command = ["ip", *map(str, words)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class Machines:
    """Machines in one network.

    Args:
        count: Number of machines.
        delay_seconds: What a packet takes in one direction; None for a cable without a delay, which
            can be taken out.
        bytes_per_second: What goes to a machine at most, with a delay, which may be 0.
        version: Version of the addresses, 4 or 6; with 6 there are no others.
        alike: Whether all machines have the same host name.
        loopback_names: Whether the name of each machine means 127.0.1.1 on itself, as on Debian.
    """

    def __init__(
        self,
        count: int = 2,
        delay_seconds: float | None = None,
        bytes_per_second: float = 0.0,
        version: int = 4,
        alike: bool = False,
        loopback_names: bool = False,
    ) -> None:
        tag = f"{os.getpid()}"
        self._spaces = [f"smp{tag}n{number}" for number in range(count)]
        self._hub = f"smp{tag}hub"
        self._cards = [f"s{tag}c{number}" for number in range(count)]
        self.names = [f"smp{tag}h{0 if alike else number}" for number in range(count)]
        prefix = "10.79.0." if version == 4 else "fd79::"
        self.addresses = [f"{prefix}{number + 1}" for number in range(count)]
        self._delay_seconds, self._version = delay_seconds, version
        self._bytes_per_second = bytes_per_second
        self._loopback_names = loopback_names
        self._ends = contextlib.ExitStack()
        self._started: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Machines:
        _remove_left_over()
        with contextlib.ExitStack() as ends:
            self.folder = Path(ends.enter_context(tempfile.TemporaryDirectory()))
            for number, space in enumerate(self._spaces):
                ip("netns", "add", space)
                ends.callback(_remove, space)
                ip("-n", space, "link", "set", "lo", "up")
                self._write_hosts(number)
            if self._delay_seconds is None:
                self._plug_all(ends)
            else:
                self._link(ends, self._delay_seconds)
            self._ends = ends.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.close()
        for process in self._started:
            process.wait(_SECONDS_TO_END)
            if process.stdout is not None:
                process.stdout.close()

    # --- processes --------------------------------------------------------------------------

    def start(
        self,
        number: int,
        command: Sequence[object],
        environ: Mapping[str, str],
        output: IO[Any] | int = subprocess.PIPE,
        errors: IO[Any] | int = subprocess.STDOUT,
        own_pids: bool = False,
    ) -> subprocess.Popen[str]:
        """Starts a command on a machine; with `own_pids` it sees only its own processes."""
        process = subprocess.Popen(
            [*self.prefix(number, own_pids), f"exec {shlex.join(map(str, command))}"],
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            text=True,
            start_new_session=True,
            cwd=self.folder,
        )
        self._started.append(process)
        return process

    def prefix(self, number: int, own_pids: bool = False) -> list[str]:
        """What to put before a command, as one text for a shell, to run it on a machine."""
        pids = ["--pid", "--fork", "--mount-proc", "--kill-child"] if own_pids else []
        inside = (
            f"hostname {self.names[number]}; mount --bind {self._hosts(number)} /etc/hosts; "
            'eval "$0"'
        )
        space = ["ip", "netns", "exec", self._spaces[number]]
        return [*space, "unshare", "--uts", *pids, "sh", "-c", inside]

    # --- the network ------------------------------------------------------------------------

    def cut(self, number: int) -> None:
        """Takes the cable of a machine out."""
        ip("-n", self._spaces[number], "link", "set", self._cards[number], "down")

    def plug(self, number: int) -> None:
        """Puts the cable of a machine in again."""
        ip("-n", self._spaces[number], "link", "set", self._cards[number], "up")

    def lose_what_is_sent_by(self, number: int, target: int) -> None:
        """Makes a machine send to a card that is not there."""
        ip("-n", self._spaces[number], "neigh", "replace", self.addresses[target], "lladdr",
           "02:00:00:00:00:99", "dev", self._cards[number], "nud", "permanent")  # fmt: skip

    @property
    def delay_file(self) -> Path:
        """The file of the delay of `delayed_link`."""
        return self.folder / "delay"

    # --- inside -----------------------------------------------------------------------------

    def _hosts(self, number: int) -> Path:
        return self.folder / f"hosts{number}"

    def _write_hosts(self, number: int) -> None:
        lines = ["127.0.0.1 localhost"] if self._version == 4 else ["::1 localhost"]
        for other, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
            if other == number and self._loopback_names:
                address = "127.0.1.1"
            lines.append(f"{address} {name}")
        self._hosts(number).write_text("\n".join(lines) + "\n")

    def _address(self, number: int, device: str) -> None:
        length, more = (24, []) if self._version == 4 else (64, ["nodad"])
        address = f"{self.addresses[number]}/{length}"
        ip("-n", self._spaces[number], "addr", "add", address, "dev", device, *more)
        ip("-n", self._spaces[number], "link", "set", device, "up")

    def _plug_all(self, ends: contextlib.ExitStack) -> None:
        ip("netns", "add", self._hub)
        ends.callback(_remove, self._hub)
        ip("-n", self._hub, "link", "add", "bridge", "type", "bridge")
        ip("-n", self._hub, "link", "set", "bridge", "up")
        for number, card in enumerate(self._cards):
            ip("link", "add", card, "netns", self._spaces[number], "type", "veth",
               "peer", "name", card, "netns", self._hub)  # fmt: skip
            ip("-n", self._hub, "link", "set", card, "master", "bridge", "up")
            self._address(number, card)

    def _link(self, ends: contextlib.ExitStack, seconds: float) -> None:
        self.delay_file.write_bytes(struct.pack("dd", seconds, self._bytes_per_second))
        link = subprocess.Popen(
            [sys.executable, LINK, self.delay_file, *self._spaces],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        ends.callback(_end, link)
        assert link.stdout is not None
        if link.stdout.readline() != "ready\n":
            raise OSError(link.communicate()[1])
        self._cards = ["tun0"] * len(self._spaces)
        for number, space in enumerate(self._spaces):
            ip("-n", space, "link", "set", "tun0", "txqueuelen", 5000)
            self._address(number, "tun0")


def _remove(space: str) -> None:
    """Ends all processes of a namespace and removes it."""
    end = time.monotonic() + _SECONDS_TO_END
    with contextlib.suppress(subprocess.CalledProcessError):
        while (pids := ip("netns", "pids", space).split()) and time.monotonic() < end:
            for pid in map(int, pids):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        ip("netns", "del", space)


def _remove_left_over() -> None:
    """Removes the namespaces of processes that were killed."""
    for line in ip("netns", "list").splitlines():
        found = re.match(r"smp(\d+)(n\d+|hub)\b", line)
        if found and not Path("/proc", found[1]).exists():
            _remove(line.split()[0])


def _end(link: subprocess.Popen[str]) -> None:
    link.kill()
    link.communicate()


@contextlib.contextmanager
def machines_or_skip(*args: Any, **kwargs: Any) -> Iterator[Machines]:
    """`Machines`; skips the test where none can be made."""
    machines = Machines(*args, **kwargs)
    try:
        machines.__enter__()
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        pytest.skip(f"network namespaces cannot be made here: {reason}")
    try:
        yield machines
    finally:
        machines.__exit__()
