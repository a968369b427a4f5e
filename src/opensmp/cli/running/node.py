"""The place of a machine in a run of several machines."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass

from opensmp.base.message_text import sentence, shown
from opensmp.cli.running.run_options import RunOptions
from opensmp.config import LAUNCHER_PREFIX
from opensmp.distributed.launch.environment import parse_address
from opensmp.errors import LaunchError

DEFAULT_PORT = 29400
"""Port of rank 0 on which the others meet it, if none is given; as torchrun's."""

_NAME_SECONDS, _NAME_PAUSE_SECONDS = 5.0, 0.5
_TOKEN = f"{LAUNCHER_PREFIX}TOKEN"


@dataclass(frozen=True)
class Node:
    """The place of this machine in a run.

    Attributes:
        first_rank: Rank of the first process here.
        size: Number of processes on all machines.
        meeting: Where rank 0 listens, `host:port`; None if all are here, at a port of one's own.
        secret: Secret of the run, which all machines know; None if they share none.
    """

    first_rank: int
    size: int
    meeting: str | None = None
    secret: str | None = None

    @classmethod
    def of(cls, options: RunOptions, environ: Mapping[str, str]) -> Node:
        """The place that the options say; raises an error with all faults."""
        faults = []
        least = options.min_nodes
        if least is not None and (least > options.nnodes or options.nnodes == 1):
            faults.append(
                f"--min-nodes {least} with --nnodes {options.nnodes}; expected several machines, "
                "and no more than --nnodes says"
            )
        if least is not None and not options.max_restarts:
            faults.append(
                f"--min-nodes {least} without --max-restarts; expected how often ranks may be "
                "started again, such as --max-restarts 10"
            )
        if least is not None and not environ.get(_TOKEN):
            faults.append(
                f"--min-nodes {least} without a secret; set {_TOKEN} to the same secret on all "
                "machines"
            )
        if options.nnodes == 1 and options.node_rank == 0 and options.master is None and not faults:
            return cls(0, options.processes)
        if options.node_rank >= options.nnodes:
            faults.append(
                f"--node-rank {options.node_rank} with --nnodes {options.nnodes}; expected 0 to "
                f"{options.nnodes - 1}"
            )
        meeting = None
        if options.master is None and options.nnodes + options.node_rank > 1:
            faults.append(
                f"--nnodes {options.nnodes} without --master; expected the name of machine 0, as "
                f"the others reach it, and a free port on it, such as --master "
                f"{os.uname().nodename}:{DEFAULT_PORT}, the same on all machines"
            )
        elif options.master is not None:
            try:
                host, port = parse_address(options.master)
                meeting = address(host, port)
                if options.nnodes > 1 and is_loopback(host):
                    faults.append(
                        f"--master {shown(options.master)} is each machine itself; expected the "
                        "name or address of machine 0 in the network"
                    )
            except ValueError as error:
                faults.append(f"--master {error}")
        if options.min_procs is not None:
            faults.append(
                "--min-procs counts ranks of one machine, and is not possible with --nnodes; leave "
                "it out, so that all are started again, or give --min-nodes"
            )
        if faults:
            raise LaunchError(f"opensmp run: {sentence(faults)}")
        first = options.node_rank * options.processes
        return cls(first, options.nnodes * options.processes, meeting, environ.get(_TOKEN))

    def token_of(self, restart: int) -> str:
        """What the ranks of a run show each other; other restarts have another one."""
        return f"{self.secret}-{restart}" if self.secret else ""


def check_name(meeting: str) -> None:
    """Raises an error if no address is known for the host of rank 0, after a few tries.

    A name server may know a machine a little later than that machine starts.
    """
    host, _ = parse_address(meeting)
    end = time.monotonic() + _NAME_SECONDS
    while True:
        try:
            socket.getaddrinfo(host, None)
        except (OSError, UnicodeError) as error:
            if time.monotonic() > end:
                raise LaunchError(
                    f"opensmp run: --master: there is no machine {shown(host)}, as far as this one "
                    f"({os.uname().nodename}) knows ({error}). Expected: a name that is in "
                    "/etc/hosts or known to the name server, or an address"
                ) from None
            time.sleep(_NAME_PAUSE_SECONDS)
        else:
            return


def address(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether this names each machine itself, also where it is no whole address."""
    return host in ("localhost", "::1") or host.startswith("127.")
