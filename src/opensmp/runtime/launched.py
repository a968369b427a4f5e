"""Which launcher started this process, and what it says about the others.

Every launcher has its own variables. `detect` reads them all and gives one frozen `Launch`;
nothing else of the library knows a launcher by name.

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
import re
import zlib
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensmp.config import IDLE_VARIABLE
from opensmp.config import LAUNCHER_PREFIX as PREFIX
from opensmp.errors import LaunchError
from opensmp.runtime.idleness import DEFAULT_SECONDS

_PORTS_TO_TRY = 8
_FIRST_PORT, _NUM_PORTS = 20000, 10000  # below the ports that Linux gives to clients
_LOCAL_JOIN_SECONDS, _REMOTE_JOIN_SECONDS = 60.0, 300.0
_LONGEST_JOIN_SECONDS = 1_000_000  # TensorFlow counts milliseconds in 32 bits

# The variables of rank, size, and of both on the machine.
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
        source: The launcher, in words, such as `"Open MPI"`.
        rank: Rank of this process among all.
        size: Number of processes; 1 means that there is nobody to meet.
        local_rank: Rank among the processes of this machine; None if the launcher does not say.
        local_size: Number of processes of this machine; None if the launcher does not say.
        addresses: `host:port` of every rank's TensorFlow server; None if the processes must
            choose and exchange them.
        meeting: Host and port at which rank 0 listens for the others; None for one process.
        num_meeting_ports: How many ports from that one on rank 0 may use. More than 1 where
            the port is derived and may be taken.
        token: Secret, or at least name, of the run; only processes that know it may join.
        has_secret: Whether it is a secret.
        join_seconds: How long the processes wait for each other at the start.
        idle_seconds: How long no process may compute anything while all are in calls that need
            others, before the run is ended; 0: for ever.
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
"""A process that was started by hand."""


def detect(environ: Mapping[str, str]) -> Launch:
    """Reads the variables of all known launchers.

    A launcher inside another one, such as `mpirun` in a Slurm job, is the one that started the
    process, so that the more specific variables come first. A size of 1 is the same as no
    launcher.

    Args:
        environ: The environment, such as `os.environ`.

    Returns:
        What the launcher says; `ALONE` if there is none.

    Raises:
        LaunchError: The variables of a launcher contradict each other, or are not enough for
            the processes to find each other.

    Example:
        ```python
        launch = detect({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "9"})
        launch.rank, launch.meeting  # (1, ("a", 9))
        ```
    """
    if f"{PREFIX}RANK" not in environ:
        _check_agreement(environ)
    for read in (_own, _tf_config, _open_mpi, _torchrun, _mpich, _slurm):
        launch = read(environ)
        if launch is not None:
            return launch if launch.size > 1 else ALONE
    return ALONE


def claim(launch: Launch, environ: MutableMapping[str, str], process: int) -> None:
    """Notes that a process is the rank that its variables name; what it starts inherits them.

    Args:
        launch: The result of `detect`.
        environ: The environment, such as `os.environ`.
        process: The id of this process.

    Raises:
        LaunchError: Another process is this rank already, and has started this one.

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


def _own(environ: Mapping[str, str]) -> Launch | None:
    if f"{PREFIX}RANK" not in environ:
        return None
    variable = f"{PREFIX}MEETING"
    return _launch(
        "opensmp run",
        environ,
        **_numbers("opensmp run", environ, *(f"{PREFIX}{name}" for name in _OWN)),
        meeting=_address(variable, environ.get(variable, "")),
    )


def _tf_config(environ: Mapping[str, str]) -> Launch | None:
    text = environ.get("TF_CONFIG", "")
    if not text.strip():
        return None
    try:
        given = json.loads(text)
        cluster, task = given.get("cluster", {}), given.get("task", {})
        jobs = [job for job in ("chief", "master", "worker") if cluster.get(job)]
        if not all(isinstance(cluster[job], list) for job in jobs):
            raise TypeError("the addresses of a job are no list")
        tasks = [(job, index) for job in jobs for index in range(len(cluster[job]))]
        addresses = tuple(str(address) for job in jobs for address in cluster[job])
        if len(tasks) <= 1 and (not tasks or task.get("type") in (None, *jobs)):
            return None
        rank = tasks.index((str(task["type"]), int(task["index"])))
        host, *_ = [_address("an address", address)[0] for address in addresses]
    except (ValueError, KeyError, TypeError, AttributeError, LaunchError) as error:
        raise LaunchError(
            f"TF_CONFIG names no rank for this process ({type(error).__name__}: {error}). "
            "Expected: a JSON object with a cluster of chief and worker addresses and a task "
            'among them, such as {"cluster": {"worker": ["a:2222", "b:2222"]}, "task": {"type": '
            f'"worker", "index": 0}}}}. Received: {text[:300]}. Parameter servers and evaluators '
            "take no part in a pipeline: do not start this script in them."
        ) from None
    return _launch(
        "TF_CONFIG",
        environ,
        rank=rank,
        size=len(tasks),
        addresses=addresses,
        job="TF_CONFIG" + json.dumps(cluster, sort_keys=True),
        host=host,
    )


def _open_mpi(environ: Mapping[str, str]) -> Launch | None:
    if "OMPI_COMM_WORLD_RANK" not in environ:
        return None
    return _launch(
        "Open MPI",
        environ,
        **_numbers("Open MPI", environ, *_OPEN_MPI),
        meeting=_master(environ),
        job=environ.get("PMIX_NAMESPACE") or _common_ancestor("orted", "prted", "mpirun"),
        host=_service_host(environ),
    )


def _torchrun(environ: Mapping[str, str]) -> Launch | None:
    if "RANK" not in environ or "WORLD_SIZE" not in environ:
        return None
    run = environ.get("TORCHELASTIC_RUN_ID", "")
    if _master(environ) is None and environ["WORLD_SIZE"].strip() != "1":
        raise LaunchError(
            f"RANK={environ['RANK']} and WORLD_SIZE={environ['WORLD_SIZE']} say that there are "
            "other processes, but not where. Expected: MASTER_ADDR and MASTER_PORT as well, the "
            "host of rank 0 and a free port on it."
        )
    return _launch(
        "RANK and WORLD_SIZE",
        environ,
        **_numbers("RANK and WORLD_SIZE", environ, *_TORCHRUN),
        meeting=_master(environ),
        job="" if run in ("", "none") else f"torchrun {run}",
    )


def _mpich(environ: Mapping[str, str]) -> Launch | None:
    if "PMI_RANK" not in environ or "PMI_SIZE" not in environ:
        return None
    numbers = _pair(environ, *_MPICH[:2])
    if numbers is not None and numbers == _pair(environ, *_SLURM[:2]):
        return None  # srun gives MPICH's numbers to all tasks, if it is set up for it
    host = _service_host(environ)
    return _launch(
        "MPICH",
        environ,
        **_numbers("MPICH", environ, *_MPICH),
        meeting=_master(environ),
        # It has no number for the run; on one machine its proxy is above all ranks.
        job=f"service {environ.get('SM_HOSTS')}" if host else _common_ancestor("hydra", "mpiexec"),
        host=host,
    )


def _slurm(environ: Mapping[str, str]) -> Launch | None:
    # A batch script has SLURM_PROCID as well, but is one process: only srun makes steps.
    if "SLURM_PROCID" not in environ or "SLURM_STEP_NUM_TASKS" not in environ:
        return None
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
    job = f"{environ.get('SLURM_JOB_ID', '0')}.{environ.get('SLURM_STEP_ID', '0')}"
    return _launch(
        "Slurm",
        environ,
        **_numbers("Slurm", environ, *_SLURM),
        meeting=_master(environ),
        job=f"slurm {job}",
        host=first_host(nodes) if nodes else None,
    )


# ---------------------------------------------------------------------------------- helpers


def _launch(
    source: str,
    environ: Mapping[str, str],
    *,
    rank: int,
    size: int,
    local_rank: int | None = None,
    local_size: int | None = None,
    addresses: tuple[str, ...] | None = None,
    meeting: tuple[str, int] | None = None,
    job: str = "",
    host: str | None = None,
) -> Launch:
    """Checks; derives the meeting from `job` and `host` where it is not given."""
    if not 0 <= rank < size:
        raise LaunchError(f"{source}: rank {rank} of {size} processes is not possible.")
    join_seconds = _join_seconds(environ)
    if size == 1:
        return Launch(source)
    one_machine = local_size == size
    secret = environ.get(f"{PREFIX}TOKEN", "").strip()
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
        meeting = (where, _FIRST_PORT + zlib.crc32(job.encode()) % (_NUM_PORTS - _PORTS_TO_TRY))
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
        token=secret or job,
        has_secret=bool(secret),
        join_seconds=join_seconds or (_LOCAL_JOIN_SECONDS if local else _REMOTE_JOIN_SECONDS),
        idle_seconds=_idle_seconds(environ),
    )


def _check_agreement(environ: Mapping[str, str]) -> None:
    """Refuses variables of several launchers that do not mean the same processes."""
    pairs = {
        "Open MPI": _pair(environ, *_OPEN_MPI[:2]),
        "MPICH": _pair(environ, *_MPICH[:2]),
        "RANK and WORLD_SIZE": _pair(environ, *_TORCHRUN[:2]),
    }
    if environ.get("TF_CONFIG", "").strip() and any(pairs.values()):
        launch = _tf_config(environ)
        pairs["TF_CONFIG"] = None if launch is None else (launch.rank, launch.size)
    said = {source: pair for source, pair in pairs.items() if pair is not None and pair[1] > 1}
    if len(set(said.values())) > 1:
        text = ", ".join(f"{name} rank {rank} of {size}" for name, (rank, size) in said.items())
        raise LaunchError(
            f"The variables of several launchers contradict each other: {text}. Expected: those of "
            "the one that started this process. Remove the others, which an earlier run or the "
            "shell may have left, from the environment."
        )


def _pair(environ: Mapping[str, str], rank: str, size: str) -> tuple[int, int] | None:
    """Rank and size, if both are numbers."""
    texts = environ.get(rank, "").strip(), environ.get(size, "").strip()
    return (int(texts[0]), int(texts[1])) if all(text.isdecimal() for text in texts) else None


def _numbers(
    source: str,
    environ: Mapping[str, str],
    rank: str,
    size: str,
    local_rank: str,
    local_size: str,
) -> dict[str, Any]:
    """The numbers that variables of these names have; those of the machine may be missing."""
    names = {"rank": rank, "size": size, "local_rank": local_rank, "local_size": local_size}
    found: dict[str, int | None] = {}
    faults = []
    for key, name in names.items():
        text = environ.get(name, "").strip()
        if text.isdecimal():
            found[key] = int(text)
        elif text or key in ("rank", "size"):
            faults.append(f"{name} is {text!r}" if text else f"{name} is not set")
        else:
            found[key] = None
    if faults:
        raise LaunchError(
            f"{source}: {'; '.join(faults)}. Expected: a whole number, as the launcher sets it."
        )
    return found


def _address(name: str, text: Any) -> tuple[str, int]:
    """Host and port of `host:port`."""
    host, _, port = str(text).rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise LaunchError(f"{name} is {text!r}. Expected: host:port, such as node0:2222.")
    return host, int(port)


def _join_seconds(environ: Mapping[str, str]) -> float | None:
    return _seconds(
        environ,
        f"{PREFIX}JOIN_SECONDS",
        "how long processes wait for each other at the start",
        f"above 0 and at most {_LONGEST_JOIN_SECONDS}",
        lambda seconds: 0 < seconds <= _LONGEST_JOIN_SECONDS,
    )


def _idle_seconds(environ: Mapping[str, str]) -> float:
    seconds = _seconds(
        environ,
        IDLE_VARIABLE,
        "how long all ranks may compute nothing before the run is ended",
        "at least 0; 0 means for ever",
        lambda seconds: seconds >= 0,
    )
    return DEFAULT_SECONDS if seconds is None else seconds


def _seconds(
    environ: Mapping[str, str],
    name: str,
    meaning: str,
    accepted: str,
    fits: Callable[[float], bool],
) -> float | None:
    """The seconds that a variable says, None if it is not set."""
    text = environ.get(name, "").strip()
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not fits(seconds):
        raise LaunchError(f"{name} is {meaning}. Expected: seconds, {accepted}. Received: {text}.")
    return seconds


def _master(environ: Mapping[str, str]) -> tuple[str, int] | None:
    host, port = environ.get("MASTER_ADDR", ""), environ.get("MASTER_PORT", "").strip()
    if not host or not port:
        return None
    if not port.isdecimal() or not 0 < int(port) < 65535:
        raise LaunchError(
            f"MASTER_PORT is {port!r}. Expected: a free port on the host of rank 0, such as 29400."
        )
    # The agent of torchrun listens on the port itself; its neighbour is free by custom.
    taken = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return host, int(port) + taken


def _service_host(environ: Mapping[str, str]) -> str | None:
    """The first host of the vendor's service, on which it starts rank 0."""
    try:
        hosts = json.loads(environ.get("SM_HOSTS", "") or "[]")
    except ValueError:
        return None
    return str(hosts[0]) if isinstance(hosts, list) and len(hosts) > 1 else None


def _common_ancestor(*names: str) -> str:
    """A name for the nearest process above this one that is called like a launcher's.

    A script may be started through a shell, so that the parent need not be the launcher.
    """
    process = os.getppid()
    while process > 1:
        try:
            stat = Path(f"/proc/{process}/stat").read_text()
        except OSError:
            break
        name, rest = stat.split("(", 1)[1].rsplit(")", 1)
        if name.startswith(names):
            return f"process {process}"
        process = int(rest.split()[1])
    return f"process {os.getppid()}"


def first_host(nodes: str) -> str:
    """The first host of a list in Slurm's short form.

    Example:
        ```python
        first_host("node[07-09,12],login")  # "node07"
        ```
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes.strip())
    name = first.group(0) if first else nodes.strip()
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", name)
