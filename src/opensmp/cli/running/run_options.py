"""The options of `opensmp run` besides those of the configuration's keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from opensmp.cli.running.process_group import GRACE_SECONDS
from opensmp.config import LAUNCHER_PREFIX

MOST_RANKS = 4096  # per machine


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What is given on the command line of `opensmp run`.

    Attributes:
        flags: The keys of the configuration that were given.
    """

    script: Annotated[
        str,
        typer.Argument(metavar="SCRIPT [ARGS]...", help="The Python script; then its arguments."),
    ]
    arguments: Annotated[list[str] | None, typer.Argument(hidden=True)] = None
    processes: Annotated[
        int,
        typer.Option(
            "-n", "--processes", min=1, max=MOST_RANKS, help="Number of ranks on a machine."
        ),
    ] = 1
    nnodes: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Number of machines, on each of which the same command is given; with --node-rank "
            "and --master.",
        ),
    ] = 1
    node_rank: Annotated[
        int, typer.Option(min=0, metavar="K", help="Number of this machine, from 0, with --nnodes.")
    ] = 0
    master: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Name or address of machine 0, as the others reach it, and a free port on it.",
        ),
    ] = None
    hosts: Annotated[
        str | None,
        typer.Option(
            metavar="A:N,B:N",
            help="Machines, and the number of ranks on each, to start from here over ssh; the "
            "number is by default that of -n. Rank 0 is on the first one.",
        ),
    ] = None
    ssh: Annotated[
        str,
        typer.Option(
            metavar="COMMAND",
            envvar=f"{LAUNCHER_PREFIX}SSH",
            help="What starts a command on another machine with --hosts, given its name and the "
            "command, such as 'ssh -p 2222'.",
        ),
    ] = "ssh"
    module: Annotated[
        bool, typer.Option("-m", "--module", help="SCRIPT is the name of a module.")
    ] = False
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="Keys of the configuration, as `opensmp tune` writes them; options come first.",
        ),
    ] = None
    flags: Mapping[str, Any]
    all_output: Annotated[
        bool, typer.Option("--all-output", "-a", help="Show the output of all ranks.")
    ] = False
    show_rank: Annotated[
        int | None,
        typer.Option(min=0, help="The rank whose output is shown otherwise.", show_default="0"),
    ] = None
    log_dir: Annotated[
        Path | None,
        typer.Option(help="Write the output of each rank to a file here, in place of an earlier."),
    ] = None
    max_restarts: Annotated[
        int,
        typer.Option(
            min=0,
            help="How often all ranks are started again after a failure; the script goes on "
            "from its last checkpoint.",
        ),
    ] = 0
    min_procs: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="K",
            help="With --max-restarts: go on with fewer ranks where some are lost, killed by the "
            "system or without a machine, but with K at least.",
        ),
    ] = None
    min_nodes: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="K",
            help="With --nnodes and --max-restarts: go on with the machines that are left where "
            "some are gone, but with K at least. Machine 0 must stay.",
        ),
    ] = None
    bind_cores: Annotated[
        bool, typer.Option("--bind-cores", help="Give each rank cores of its own.")
    ] = False
    join_seconds: Annotated[
        float | None,
        typer.Option(
            min=1.0,
            envvar=f"{LAUNCHER_PREFIX}JOIN_SECONDS",
            help="How long ranks wait for each other in smp.init.",
        ),
    ] = None
    idle_seconds: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="How long no rank may compute anything while all wait, before the run ends; "
            "0: for ever.",
        ),
    ] = None
    grace_seconds: Annotated[
        float,
        typer.Option(
            min=0.0,
            envvar=f"{LAUNCHER_PREFIX}GRACE_SECONDS",
            help="How long ranks may go on after SIGTERM or Ctrl-C, such as to save a checkpoint, "
            "before they are killed.",
        ),
    ] = GRACE_SECONDS
