"""What a launcher says about this process and the others, and how its variables are read."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from opensmp.config import IDLE_VARIABLE
from opensmp.config import LAUNCHER_PREFIX as PREFIX
from opensmp.distributed.launch.environment import Variables
from opensmp.distributed.watchdog.verdicts.stalls import DEFAULT_SECONDS
from opensmp.errors import LaunchError

_PORTS_TO_TRY = 8
_FIRST_PORT, _NUM_PORTS = 20000, 10000  # below Linux's ephemeral ports
_LOCAL_JOIN_SECONDS, _REMOTE_JOIN_SECONDS = 60.0, 300.0
LONGEST_JOIN_SECONDS = 1_000_000
"""Maximum join time: TensorFlow counts milliseconds in 32 bits."""


@dataclass(frozen=True)
class Launch:
    """What a launcher says about this process and the others.

    Attributes:
        source: Name of the launcher, such as `"Open MPI"`.
        rank: Rank of this process among all.
        size: Number of processes; 1 means that there are no others.
        local_rank: Rank among the processes of this machine; None if the launcher does not say.
        local_size: Number of processes of this machine; None if the launcher does not say.
        addresses: `host:port` of every rank's TensorFlow server; None if the processes must choose
            and exchange them.
        meeting: Host and port at which rank 0 listens for the others; None for one process.
        num_meeting_ports: Number of consecutive ports, from that one on, that rank 0 may use. More
            than 1 if the port is derived and may be taken.
        token: Secret, or at least name, of the run; only processes that know it may join.
        has_secret: Whether the token is secret.
        join_seconds: How long the processes wait for each other at the start.
        idle_seconds: How long all processes may be in calls that need others without any of them
            computing, before the run is ended; 0: no limit.
    """

    source: str
    rank: int = 0
    size: int = 1
    local_rank: int | None = None
    local_size: int | None = None
    addresses: tuple[str, ...] | None = None
    meeting: tuple[str, int] | None = None
    num_meeting_ports: int = 1
    token: str = ""
    has_secret: bool = False
    join_seconds: float = _LOCAL_JOIN_SECONDS
    idle_seconds: float = DEFAULT_SECONDS


class Launcher(NamedTuple):
    """How the processes of one launcher are recognised.

    Attributes:
        name: The launcher, in words.
        rank_variable: The variable that a program must not inherit if it is no rank.
        read: Reads its variables; None if it has not started this process.
        place: Rank and size, for the check that the variables of several launchers agree; None for
            a launcher that may start another one, whose variables are then different.
    """

    name: str
    rank_variable: str
    read: Callable[[Variables], Launch | None]
    place: Callable[[Variables], tuple[int, int] | None] | None = None


def launch_of(
    source: str,
    variables: Variables,
    *,
    rank: int | None,
    size: int | None,
    local_rank: int | None = None,
    local_size: int | None = None,
    addresses: tuple[str, ...] | None = None,
    meeting: tuple[str, int] | None = None,
    job: str = "",
    host: str | None = None,
) -> Launch:
    """Checks the values; derives a missing meeting point from `job` and `host`."""
    join_seconds, idle_seconds = _join_seconds(variables), _idle_seconds(variables)
    faults = variables.faults
    if rank is not None and size is not None and not rank < size:
        faults.append(f"rank {rank} of {size} processes is not possible")
    if local_size is not None and size is not None and not 0 < local_size <= size:
        faults.append(f"{local_size} of {size} processes cannot be on this machine")
    most = size if local_size is None else local_size
    if local_rank is not None and most is not None and not local_rank < most:
        faults.append(f"local rank {local_rank} of {most} processes is not possible")
    variables.raise_faults(source)
    assert rank is not None  # else it was a fault
    assert size is not None
    if size == 1:
        return Launch(source)
    one_machine = local_size == size
    secret = variables.text(f"{PREFIX}TOKEN")
    ports = 1
    if meeting is None:
        where = "127.0.0.1" if one_machine and host is None else host
        if where is None:
            raise LaunchError(
                f"{source}: rank {rank} of {size} cannot find the others, which "
                + ("run on several machines" if local_size else "may run on several machines")
                + ". Expected: the variables MASTER_ADDR and MASTER_PORT, the host of rank "
                "0 and a free port on it, in every process, such as `mpirun -x "
                "MASTER_ADDR=node0 -x MASTER_PORT=29400 ...`."
            )
        name = zlib.crc32(_encodable(job).encode())
        meeting = (where, _FIRST_PORT + name % (_NUM_PORTS - _PORTS_TO_TRY))
        ports = _PORTS_TO_TRY
    local = one_machine or meeting[0] in ("127.0.0.1", "localhost", "::1")
    return Launch(
        source=source,
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        addresses=addresses,
        meeting=meeting,
        num_meeting_ports=ports,
        token=_encodable(secret or job),
        has_secret=bool(secret),
        join_seconds=join_seconds or (_LOCAL_JOIN_SECONDS if local else _REMOTE_JOIN_SECONDS),
        idle_seconds=idle_seconds,
    )


def _encodable(text: str) -> str:
    """The text with backslash escapes for what UTF-8 cannot encode, such as invalid bytes."""
    return text.encode("utf-8", "backslashreplace").decode()


def numbers(
    variables: Variables, rank: str, size: str, local_rank: str, local_size: str
) -> dict[str, Any]:
    """The values of these variables; those of the machine may be missing."""
    return {
        "rank": variables.whole(rank, required=True),
        "size": variables.whole(size, required=True),
        "local_rank": variables.whole(local_rank) if local_rank else None,
        "local_size": variables.whole(local_size) if local_size else None,
    }


def _join_seconds(variables: Variables) -> float | None:
    return variables.seconds(
        f"{PREFIX}JOIN_SECONDS",
        "how long processes wait for each other at the start",
        f"above 0 and at most {LONGEST_JOIN_SECONDS}",
        lambda seconds: 0 < seconds <= LONGEST_JOIN_SECONDS,
    )


def _idle_seconds(variables: Variables) -> float:
    seconds = variables.seconds(
        IDLE_VARIABLE,
        "how long all ranks may compute nothing before the run is ended",
        "at least 0; 0 means for ever",
        lambda seconds: 0 <= seconds < math.inf,
    )
    return DEFAULT_SECONDS if seconds is None else seconds


def master(variables: Variables) -> tuple[str, int] | None:
    """The host of rank 0 and a port on it, from `MASTER_ADDR` and `MASTER_PORT`."""
    meeting = variables.host_and_port("MASTER_ADDR", "MASTER_PORT")
    if meeting is None:
        return None
    host, port = meeting
    # torchrun's agent listens on the port itself; the next one is free by convention.
    return host, port + (variables.text("TORCHELASTIC_USE_AGENT_STORE") == "True")


def service_host(variables: Variables) -> str | None:
    """The first host of the vendor's service, on which rank 0 runs; None for a single host."""
    hosts = variables.hosts("SM_HOSTS")
    return hosts[0] if len(hosts) > 1 else None


def common_ancestor(*names: str) -> str:
    """Identifies the nearest ancestor process whose name begins like that of a launcher.

    The parent need not be the launcher, because a shell may start the script.
    """
    process = os.getppid()
    while process > 1:
        try:
            stat = Path(f"/proc/{process}/stat").read_text(errors="replace")
        except OSError:
            break
        name, rest = stat.split("(", 1)[1].rsplit(")", 1)
        if name.startswith(names):
            return f"process {process}"
        process = int(rest.split()[1])
    return f"process {os.getppid()}"
