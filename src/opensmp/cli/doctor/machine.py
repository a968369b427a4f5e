"""Checks of the machine: cores, memory, shared memory, ports, clock; imports no TensorFlow."""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
import resource
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from opensmp.base.message_text import counted
from opensmp.cli.doctor.finding import Finding, ok, warning
from opensmp.cli.doctor.finding import error as failed
from opensmp.compiler.format import format_bytes

_GROUP = Path("/sys/fs/cgroup")
_LEAST_FILES = 1024
_LEAST_FREE_BYTES = 1 << 30
_EARLIEST = 1735689600  # 2025-01-01: clocks that start at zero are earlier
_THREADS = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")


def threads(environ: Mapping[str, str], group: Path = _GROUP) -> Iterator[Finding]:
    """Cores that this process may use, and what limits them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = _quota(group)
    text = counted(cores or 1, "core")
    if quota is not None and quota < (cores or 1):
        yield warning(
            "threads",
            f"{text} to run on, but the container may use the time of {quota:g} only: TensorFlow "
            "starts a thread for each and all of them are held up in turn",
            f"taskset -c 0-{max(0, int(quota) - 1)} opensmp run ...",
        )
    else:
        yield ok("threads", text)
    given = [f"{name}={environ[name]}" for name in _THREADS if environ.get(name)]
    if given:
        yield warning(
            "threads",
            f"{', '.join(given)}: smp.init leaves numbers of threads that are set, and partitions "
            "may overlap less",
            f"unset {' '.join(each.partition('=')[0] for each in given)}",
        )


def _quota(group: Path) -> float | None:
    """Cores' worth of time that a control group may use; None without a limit."""
    with contextlib.suppress(OSError, ValueError):
        limit, _, period = (group / "cpu.max").read_text().partition(" ")
        return None if limit == "max" else int(limit) / int(period)
    with contextlib.suppress(OSError, ValueError):
        limit = (group / "cpu" / "cpu.cfs_quota_us").read_text()
        period = (group / "cpu" / "cpu.cfs_period_us").read_text()
        return None if int(limit) < 0 else int(limit) / int(period)
    return None


def memory(group: Path = _GROUP, table: Path = Path("/proc/meminfo")) -> Iterator[Finding]:
    """Memory of the machine, or of the container."""
    sizes: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError):
        for line in table.read_text().splitlines():
            name, _, rest = line.partition(":")
            if rest.strip().endswith("kB"):
                sizes[name] = 1024 * int(rest.split()[0])
    total = sizes.get("MemTotal", 0)
    limit = total
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            limit = min(limit or 1 << 62, int((group / name).read_text()))
    if not limit:
        return
    free = sizes.get("MemAvailable", limit)
    text = f"{format_bytes(limit)}, {format_bytes(min(free, limit))} free"
    if total and limit < total:
        text += f" (the container's limit; the machine has {format_bytes(total)})"
    yield ok("memory", text)


def shared_memory() -> Iterator[Finding]:
    """Memory that processes of one machine share, through which tensors travel."""
    mend = "nothing has to be done: tensors travel by TensorFlow's collectives, somewhat slower"
    if not hasattr(os, "memfd_create") or platform.machine() not in ("x86_64", "AMD64"):
        yield warning(
            "shared memory", f"not used on {platform.system()} {platform.machine()}", mend
        )
        return
    try:
        handle = os.memfd_create("opensmp-doctor")
        try:
            os.truncate(handle, 1 << 20)
            with mmap.mmap(handle, 1 << 20) as mapped:
                mapped[-1] = 1
        finally:
            os.close(handle)
    except OSError as fault:
        yield warning(
            "shared memory",
            f"cannot be made here ({fault.strerror})",
            'smp.init({"transport": "collective", ...})',
        )
    else:
        yield ok("shared memory", "works")
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < _LEAST_FILES:
        wanted = _LEAST_FILES if most == resource.RLIM_INFINITY else min(_LEAST_FILES, most)
        yield warning(
            "shared memory",
            f"a process may open {files} files only; ranks need one for each pair and step",
            f"ulimit -n {wanted}",
        )


def ports() -> Iterator[Finding]:
    """Connections of ranks: on this machine, and by its name from others."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(5)
            with socket.create_connection(server.getsockname(), 5):
                server.accept()[0].close()
    except OSError as fault:
        yield failed(
            "ports",
            f"no connection over 127.0.0.1 ({fault.strerror or fault}): ranks cannot meet",
            "ip link set lo up   # or allow the loopback interface in the container's network",
        )
    else:
        yield ok("ports", "connections over 127.0.0.1 work")
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except (OSError, UnicodeError):
        yield warning(
            "ports",
            f"the name of this machine, {name!r}, has no address: ranks on other machines cannot "
            "find it by name",
            f"echo '<address> {name}' >> /etc/hosts   # only for runs over several machines",
        )
    else:
        local = " (this machine only)" if address.startswith("127.") else ""
        yield ok("ports", f"{name} is {address}{local}")


def clock() -> Iterator[Finding]:
    """The clock, with which checkpoints and logs are dated."""
    now = time.time()
    if now < _EARLIEST:
        shown = time.strftime("%Y-%m-%d", time.gmtime(now))
        yield warning(
            "clock",
            f"it says {shown}: dates of checkpoints and certificates are wrong",
            "timedatectl set-ntp true",
        )
    else:
        yield ok("clock", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now)))


def files() -> Iterator[Finding]:
    """The folder of temporary files, and the time that its disk gives to new ones."""
    folder = tempfile.gettempdir()
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()
            written = os.stat(file.name).st_mtime
        free = os.statvfs(folder)
    except OSError as fault:
        yield failed(
            "files",
            f"no file can be written to {folder} ({fault.strerror})",
            "export TMPDIR=/a/folder/with/room",
        )
        return
    available = free.f_bavail * free.f_frsize
    skew = abs(written - time.time())
    if skew > 2:
        yield warning(
            "clock",
            f"the disk of {folder} and this machine differ by {skew:.0f} s",
            "timedatectl set-ntp true   # on the server of the disk as well",
        )
    if available < _LEAST_FREE_BYTES:
        yield warning(
            "files",
            f"{format_bytes(available)} are left in {folder}",
            "export TMPDIR=/a/folder/with/room",
        )
    else:
        yield ok("files", f"{format_bytes(available)} are left in {folder}")
