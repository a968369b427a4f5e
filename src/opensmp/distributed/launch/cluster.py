"""Joins the processes of a run to one TensorFlow cluster.

`meet` finds the other processes, and `start` starts TensorFlow's multi-client collective runtime,
after which collective operations work. The devices of this process must be created in between,
since TensorFlow cannot create them later. A cluster lasts until the process ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensmp import _private
from opensmp.distributed.launch.confinement import confined
from opensmp.distributed.launch.launch import Launch
from opensmp.distributed.launch.meeting import rendezvous
from opensmp.errors import AlreadyInitializedError, CommunicationError, LaunchError

_logger = logging.getLogger("opensmp")

# opensmp's own heartbeats are faster and say more; TensorFlow's are a fallback.
_HEARTBEAT_SECONDS = 20.0


@dataclass(frozen=True)
class Cluster:
    """The processes of this run."""

    launch: Launch
    meeting: rendezvous.Meeting
    local_rank: int
    local_size: int

    @property
    def rank(self) -> int:
        """Rank of this process in the world."""
        return self.launch.rank

    @property
    def host(self) -> str:
        """The host device of this process, on which its collectives run."""
        return f"{task_name(self.rank)}/device:CPU:0"


_joined: Cluster | None = None


def task_name(rank: int) -> str:
    """TensorFlow's name of the process of a rank, such as `"/job:worker/replica:0/task:1"`."""
    return f"/job:worker/replica:0/task:{rank}"


def joined() -> Cluster | None:
    """The cluster that this process belongs to; None if the process runs alone."""
    return _joined


def needed(what: str, members: Sequence[int] | None) -> Cluster:
    """The cluster, for calls that need other processes."""
    if _joined is None:
        others = "another rank" if members is None else f"the ranks {list(members)}"
        raise CommunicationError(
            f"{what} needs {others}, but this process was started without a connection to others. "
            "Expected: a group of one process. Start the processes with a launcher, such as "
            "`opensmp run -n 2 script.py`."
        )
    return _joined


def meet(launch: Launch, facts: Mapping[str, Any]) -> Cluster:
    """Finds the other processes."""
    if _private.is_tensorflow_started():
        raise AlreadyInitializedError(
            "smp.init: TensorFlow was used before in this process, so that it can no longer join "
            f"the other {launch.size - 1}. Call smp.init before the first TensorFlow operation, "
            "variable or layer, right after the imports."
        )
    meeting = rendezvous.meet(launch, machine_name(), os.getpid(), facts)
    machine = meeting.peers[launch.rank].machine
    here = [peer.rank for peer in meeting.peers if peer.machine == machine]
    return Cluster(
        launch=launch,
        meeting=meeting,
        local_rank=here.index(launch.rank) if launch.local_rank is None else launch.local_rank,
        local_size=len(here) if launch.local_size is None else launch.local_size,
    )


def start(cluster: Cluster, nccl: bool) -> None:
    """Starts TensorFlow's multi-process runtime; returns when all processes have."""
    global _joined
    launch, addresses = cluster.launch, [peer.address for peer in cluster.meeting.peers]
    began = time.monotonic()
    bypass_proxies(address.rsplit(":", 1)[0] for address in addresses)
    ports = [int(address.rsplit(":", 1)[1]) for address in addresses]
    is_here = _is_here(cluster.meeting)
    if is_here:  # a confined server listens on no other address
        addresses = [f"127.0.0.1:{port}" for port in ports]
    try:
        with confined(ports[launch.rank]) if is_here else contextlib.nullcontext():
            _private.join_cluster(
                launch.rank,
                addresses,
                nccl=nccl,
                heartbeat_seconds=_HEARTBEAT_SECONDS,
                join_seconds=launch.join_seconds,
            )
    except Exception as error:
        raise LaunchError(
            f"{launch.source}: rank {launch.rank} of {launch.size} could not start TensorFlow's "
            f"server at {addresses[launch.rank]} or reach the others at "
            f"{', '.join(addresses)}: {type(error).__name__}: {error}"
        ) from error
    finally:
        if cluster.meeting.reservation is not None:
            cluster.meeting.reservation.close()
    _joined = cluster
    _logger.info(
        "rank %d of %d joined by %s in %.1f s: %s",
        launch.rank,
        launch.size,
        launch.source,
        time.monotonic() - began,
        ", ".join(addresses),
    )


def _is_here(meeting: rendezvous.Meeting) -> bool:
    """Whether all processes are on this machine and in the same network namespace."""
    # Containers may share the host name and still have a network of their own.
    return len({(peer.machine, peer.network) for peer in meeting.peers}) == 1


def bypass_proxies(hosts: Iterable[str]) -> None:
    """Excludes the hosts of the run from proxies, for the connections between processes.

    TensorFlow's connections would use the HTTP proxy of `http_proxy` and similar variables.
    Existing entries of `no_proxy` are kept.
    """
    added = [*(host.strip("[]") for host in hosts), "localhost", "127.0.0.1"]
    for name in ("no_grpc_proxy", "no_proxy"):
        known = [host.strip() for host in os.environ.get(name, "").split(",") if host.strip()]
        if name == "no_grpc_proxy" and not known:
            continue  # if set, gRPC would ignore no_proxy
        os.environ[name] = ",".join(dict.fromkeys([*known, *added]))


def host_of(machine: str) -> str:
    """The host name in a `machine_name`."""
    return machine.partition(" ")[0]


def machine_name() -> str:
    """A name that processes share if, and only if, they run on the same machine."""
    # Containers of one machine share the boot id; cloned machines share the host name.
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()} {boot}".strip()
