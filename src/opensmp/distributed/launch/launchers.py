"""Detects the launcher that started this process, and reads what it says about the others.

Every launcher sets variables of its own. `detect` reads them all and returns one frozen `Launch`.

| source | how it is recognised |
| --- | --- |
| `opensmp run` | `OPENSMP_RUN_RANK` |
| `TF_CONFIG` | `TF_CONFIG` with a cluster of two or more tasks |
| Open MPI, also inside the vendor's service | `OMPI_COMM_WORLD_RANK` |
| torchrun and its like | `RANK` and `WORLD_SIZE` |
| MPICH and its relatives | `PMI_RANK` |
| Slurm's `srun` | `SLURM_PROCID` and `SLURM_STEP_NUM_TASKS` |
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensmp.base.message_text import plain, shown
from opensmp.config import IDLE_VARIABLE
from opensmp.config import LAUNCHER_PREFIX as PREFIX
from opensmp.distributed.launch.environment import Variables, first_host
from opensmp.distributed.launch.tf_config import read_tf_config
from opensmp.distributed.watchdog.stalls import DEFAULT_SECONDS
from opensmp.errors import LaunchError

_PORTS_TO_TRY = 8
_FIRST_PORT, _NUM_PORTS = 20000, 10000  # below Linux's ephemeral ports
_LOCAL_JOIN_SECONDS, _REMOTE_JOIN_SECONDS = 60.0, 300.0
LONGEST_JOIN_SECONDS = 1_000_000
"""Maximum join time: TensorFlow counts milliseconds in 32 bits."""

# Variables of rank, size, local rank and local size.
_OWN = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
_OPEN_MPI = tuple(f"OMPI_COMM_WORLD_{name}" for name in _OWN)
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_MPICH = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
_SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "")

_RANK_OF = {
    "opensmp run": f"{PREFIX}RANK",
    "TF_CONFIG": "TF_CONFIG",
    "Open MPI": _OPEN_MPI[0],
    "RANK and WORLD_SIZE": _TORCHRUN[0],
    "MPICH": _MPICH[0],
    "Slurm": _SLURM[0],
}
_CLAIM = f"{PREFIX}CLAIMED_BY"


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


ALONE = Launch("no launcher", local_rank=0, local_size=1)
"""A process without a launcher."""


def detect(environ: Mapping[str, str]) -> Launch:
    """Reads the variables of all known launchers.

    Of nested launchers, such as `mpirun` in a Slurm job, the inner one started the process, so that
    the more specific variables take precedence. A size of 1 is the same as no launcher.

    Args:
        environ: The environment, such as `os.environ`.

    Returns:
        What the launcher says; `ALONE` if there is none.

    Raises:
        LaunchError: The variables contradict each other, or do not suffice for the processes to
            find each other.

    Example:
        ```python
        launch = detect({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "9"})
        launch.rank, launch.meeting  # (1, ("a", 9))
        ```
    """
    if f"{PREFIX}RANK" not in environ:
        _check_agreement(Variables(environ))
    for read in (_own, _tf_config, _open_mpi, _torchrun, _mpich, _slurm):
        launch = read(Variables(environ))
        if launch is not None:
            return launch if launch.size > 1 else ALONE
    return ALONE


def claim(launch: Launch, environ: MutableMapping[str, str], process: int) -> None:
    """Records in the environment, which child processes inherit, that this process is its rank.

    Args:
        launch: The result of `detect`.
        environ: The environment, such as `os.environ`.
        process: The id of this process.

    Raises:
        LaunchError: A parent of this process is this rank already.

    Example:
        ```python
        claim(detect(os.environ), os.environ, os.getpid())
        ```
    """
    place = json.dumps([launch.source, launch.rank, launch.size, launch.meeting, launch.token])
    owner, _, claimed = environ.get(_CLAIM, "").partition(" ")
    if claimed == place and owner != str(process):
        raise LaunchError(
            f"smp.init: process {owner} is rank {launch.rank} of this run already; process "
            f"{process}, which it has started, cannot be the same rank. Expected: smp.init in the "
            "rank itself only. If multiprocessing runs the script anew in its workers, call "
            'smp.init under `if __name__ == "__main__":`. A program of its own must be started '
            f"without the variables of the launcher, such as `env -u {_RANK_OF[launch.source]} "
            "python other.py`."
        )
    environ[_CLAIM] = f"{process} {place}"


# ------------------------------------------------------------------------------ conventions


def _own(variables: Variables) -> Launch | None:
    if f"{PREFIX}RANK" not in variables:
        return None
    return _launch(
        "opensmp run",
        variables,
        **_numbers(variables, *(f"{PREFIX}{name}" for name in _OWN)),
        meeting=variables.address(f"{PREFIX}MEETING"),
    )


def _tf_config(variables: Variables) -> Launch | None:
    place = read_tf_config(variables.text("TF_CONFIG"))
    if place is None:
        return None
    return _launch(
        "TF_CONFIG",
        variables,
        rank=place.rank,
        size=len(place.addresses),
        addresses=place.addresses,
        job=f"TF_CONFIG{place.jobs}",
        host=place.hosts[0],
    )


def _open_mpi(variables: Variables) -> Launch | None:
    if "OMPI_COMM_WORLD_RANK" not in variables:
        return None
    return _launch(
        "Open MPI",
        variables,
        **_numbers(variables, *_OPEN_MPI),
        meeting=_master(variables),
        job=variables.text("PMIX_NAMESPACE") or _common_ancestor("orted", "prted", "mpirun"),
        host=_service_host(variables),
    )


def _torchrun(variables: Variables) -> Launch | None:
    if "RANK" not in variables or "WORLD_SIZE" not in variables:
        return None
    run = variables.text("TORCHELASTIC_RUN_ID")
    meeting = _master(variables)
    if meeting is None and not variables.faults and variables.text("WORLD_SIZE") != "1":
        variables.faults.append(
            f"RANK={plain(variables.text('RANK'))} and "
            f"WORLD_SIZE={plain(variables.text('WORLD_SIZE'))} say that there are other "
            "processes, but not where. Expected: MASTER_ADDR and MASTER_PORT as well, the host "
            "of rank 0 and a free port on it"
        )
    return _launch(
        "RANK and WORLD_SIZE",
        variables,
        **_numbers(variables, *_TORCHRUN),
        meeting=meeting,
        job="" if run in ("", "none") else f"torchrun {run}",
    )


def _mpich(variables: Variables) -> Launch | None:
    if "PMI_RANK" not in variables or "PMI_SIZE" not in variables:
        return None
    numbers = variables.pair(*_MPICH[:2])
    if numbers is not None and numbers == variables.pair(*_SLURM[:2]):
        return None  # srun may set MPICH's variables for all tasks
    host = _service_host(variables)
    hosts = variables.text("SM_HOSTS")
    return _launch(
        "MPICH",
        variables,
        **_numbers(variables, *_MPICH),
        meeting=_master(variables),
        # MPICH has no run id; on one machine its proxy is an ancestor of all ranks.
        job=f"service {hosts}" if host else _common_ancestor("hydra", "mpiexec"),
        host=host,
    )


def _slurm(variables: Variables) -> Launch | None:
    # A batch script has SLURM_PROCID as well, but is one process: only srun creates steps.
    if "SLURM_PROCID" not in variables or "SLURM_STEP_NUM_TASKS" not in variables:
        return None
    job = f"{variables.text('SLURM_JOB_ID') or 0}.{variables.text('SLURM_STEP_ID') or 0}"
    return _launch(
        "Slurm",
        variables,
        **_numbers(variables, *_SLURM),
        meeting=_master(variables),
        job=f"slurm {job}",
        host=_first_node(variables),
    )


# ---------------------------------------------------------------------------------- helpers


def _launch(
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


def _check_agreement(variables: Variables) -> None:
    """Raises if the variables of several launchers describe different processes."""
    pairs = {
        "Open MPI": variables.pair(*_OPEN_MPI[:2]),
        "MPICH": variables.pair(*_MPICH[:2]),
        "RANK and WORLD_SIZE": variables.pair(*_TORCHRUN[:2]),
    }
    if variables.text("TF_CONFIG") and any(pairs.values()):
        launch = _tf_config(variables)
        pairs["TF_CONFIG"] = None if launch is None else (launch.rank, launch.size)
    said = {source: pair for source, pair in pairs.items() if pair is not None and pair[1] > 1}
    if len(set(said.values())) > 1:
        text = ", ".join(f"{name} rank {rank} of {size}" for name, (rank, size) in said.items())
        raise LaunchError(
            f"The variables of several launchers contradict each other: {text}. Expected: those of "
            "the one that started this process. Remove the others, which an earlier run or the "
            "shell may have left, from the environment."
        )


def _numbers(
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


def _master(variables: Variables) -> tuple[str, int] | None:
    meeting = variables.host_and_port("MASTER_ADDR", "MASTER_PORT")
    if meeting is None:
        return None
    host, port = meeting
    # torchrun's agent listens on the port itself; the next one is free by convention.
    return host, port + (variables.text("TORCHELASTIC_USE_AGENT_STORE") == "True")


def _service_host(variables: Variables) -> str | None:
    """The first host of the vendor's service, on which rank 0 runs; None for a single host."""
    hosts = variables.hosts("SM_HOSTS")
    return hosts[0] if len(hosts) > 1 else None


def _first_node(variables: Variables) -> str | None:
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"):
        nodes = variables.text(name)
        if nodes:
            try:
                return first_host(nodes)
            except ValueError as error:
                variables.faults.append(
                    f"{name} is {shown(nodes)}; expected a list of nodes as Slurm writes it, such "
                    f"as node[07-09,12]; {error}"
                )
                return None
    return None


def _common_ancestor(*names: str) -> str:
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
