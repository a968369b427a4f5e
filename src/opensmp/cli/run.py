"""`opensmp run`: starts one process per rank on this machine."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from opensmp.base.message_text import shown
from opensmp.cli.process_group import GRACE_SECONDS, Ranks
from opensmp.cli.restarts import Restarts, known_layout
from opensmp.config import IDLE_VARIABLE, LAUNCHER_PREFIX, Config
from opensmp.distributed import world
from opensmp.distributed.launch import horovod_finder, rendezvous
from opensmp.distributed.launch.exit_notice import ExitNotifier
from opensmp.distributed.launch.init_markers import clear_marks, read_marks
from opensmp.distributed.launch.launchers import LONGEST_JOIN_SECONDS
from opensmp.errors import LaunchError

# Large tensors are allocated and freed in every step. If glibc returns the memory to the system
# each time, getting it back costs more than the transfer of the message.
_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_TOP_PAD_": str(16 << 20),
}

_MOST_RANKS = 4096  # per machine


def run(
    script: Annotated[
        str,
        typer.Argument(metavar="SCRIPT [ARGS]...", help="The Python script; then its arguments."),
    ],
    arguments: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    processes: Annotated[
        int,
        typer.Option(
            "-n", "--processes", min=1, max=_MOST_RANKS, help="Number of ranks to start here."
        ),
    ] = 1,
    module: Annotated[
        bool, typer.Option("-m", "--module", help="SCRIPT is the name of a module.")
    ] = False,
    partitions: Annotated[int | None, typer.Option(help="Number of partitions.")] = None,
    microbatches: Annotated[int | None, typer.Option(help="Microbatches per step.")] = None,
    pipeline: Annotated[
        str | None, typer.Option(help="interleaved, simple or zero_bubble.")
    ] = None,
    active_microbatches: Annotated[
        int | None, typer.Option(help="Most microbatches in flight.")
    ] = None,
    optimize: Annotated[str | None, typer.Option(help="memory or speed.")] = None,
    placement_strategy: Annotated[str | None, typer.Option(help="cluster or spread.")] = None,
    processes_per_replica: Annotated[
        int | None, typer.Option(help="Processes that hold one replica of the model.")
    ] = None,
    auto_partition: Annotated[
        bool | None, typer.Option(help="Whether partitions are chosen automatically.")
    ] = None,
    default_partition: Annotated[
        int | None, typer.Option(help="Where operations outside every smp.partition go.")
    ] = None,
    contiguous: Annotated[
        bool | None, typer.Option(help="Whether partitions are connected pieces.")
    ] = None,
    horovod: Annotated[
        bool | None, typer.Option(help="Whether the script makes Horovod-style calls.")
    ] = None,
    devices: Annotated[
        str | None, typer.Option(help="cpu, gpu, or a list such as CPU:0,CPU:1.")
    ] = None,
    plan: Annotated[str | None, typer.Option(help="A plan's JSON file.")] = None,
    all_output: Annotated[
        bool, typer.Option("--all-output", "-a", help="Show the output of all ranks.")
    ] = False,
    show_rank: Annotated[
        int, typer.Option(min=0, help="The rank whose output is shown otherwise.")
    ] = 0,
    log_dir: Annotated[
        Path | None,
        typer.Option(help="Write the output of each rank to a file here, in place of an earlier."),
    ] = None,
    max_restarts: Annotated[
        int,
        typer.Option(
            min=0,
            help="How often all ranks are started again after a failure; the script goes on "
            "from its last checkpoint.",
        ),
    ] = 0,
    min_procs: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="K",
            help="With --max-restarts: go on with fewer ranks where some are lost, killed by the "
            "system or without a machine, but with K at least.",
        ),
    ] = None,
    bind_cores: Annotated[
        bool, typer.Option("--bind-cores", help="Give each rank cores of its own.")
    ] = False,
    join_seconds: Annotated[
        float | None,
        typer.Option(
            min=1.0,
            envvar=f"{LAUNCHER_PREFIX}JOIN_SECONDS",
            help="How long ranks wait for each other in smp.init.",
        ),
    ] = None,
    idle_seconds: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="How long no rank may compute anything while all wait, before the run ends; "
            "0: for ever.",
        ),
    ] = None,
    grace_seconds: Annotated[
        float,
        typer.Option(
            min=0.0,
            envvar=f"{LAUNCHER_PREFIX}GRACE_SECONDS",
            help="How long ranks may go on after SIGTERM or Ctrl-C, such as to save a checkpoint, "
            "before they are killed.",
        ),
    ] = GRACE_SECONDS,
) -> None:
    """Starts a script once per rank on this machine.

    Options come before the script; what comes after it belongs to the script. If a rank
    fails, all ranks are ended, its error is printed last, and its exit code is returned.
    """
    given = {
        "partitions": partitions,
        "microbatches": microbatches,
        "pipeline": pipeline,
        "active_microbatches": active_microbatches,
        "optimize": optimize,
        "placement_strategy": placement_strategy,
        "processes_per_replica": processes_per_replica,
        "auto_partition": auto_partition,
        "default_partition": default_partition,
        "contiguous": contiguous,
        "horovod": horovod,
        "devices": devices.split(",") if devices and ":" in devices else devices,
        "plan": plan,
    }
    flags = {key: value for key, value in given.items() if value is not None}
    check_flags(flags, processes, os.environ)
    _check_files(script, module, log_dir)
    _check_seconds(join_seconds, idle_seconds)
    if min_procs is not None and (min_procs > processes or not max_restarts):
        raise LaunchError(
            f"--min-procs {min_procs} with -n {processes} and --max-restarts {max_restarts}. "
            "Expected: no more than -n says, and how often ranks may be started again, such as "
            "--max-restarts 10."
        )
    if show_rank >= processes:
        raise LaunchError(
            f"--show-rank {show_rank}: there is no such rank. Expected: 0 to {processes - 1}."
        )
    # Run as a file, not as a module: importing an opensmp module would import TensorFlow before the
    # script can set its environment variables.
    command = [sys.executable, horovod_finder.__file__, *(["-m"] if module else [])]
    command += [script, *(arguments or [])]
    to_show = set(range(processes)) if all_output else {show_rank}
    restarts = Restarts(max_restarts, processes, min_procs, known_layout(flags))
    # Reserved across restarts, so that all runs meet at the same port.
    reservation, port = rendezvous.reserve_port("127.0.0.1")
    with reservation, tempfile.TemporaryDirectory(prefix="opensmp-run-") as marks:
        while True:
            processes = restarts.size
            restart = restarts.number
            clear_marks(marks)
            token = secrets.token_hex(16)  # keeps processes of an earlier run from joining
            environments = [
                environment(
                    os.environ,
                    rank=rank,
                    size=processes,
                    port=port,
                    token=token,
                    flags=flags,
                    restart=restart,
                    join_seconds=join_seconds,
                    idle_seconds=idle_seconds,
                    grace_seconds=grace_seconds,
                    marks=marks,
                )
                for rank in range(processes)
            ]
            cores = share_of_cores(os.sched_getaffinity(0), processes) if bind_cores else None
            appends = restart > 0
            with contextlib.closing(ExitNotifier(port, token, processes)) as absence:
                # With fewer ranks after a restart, the rank to show may no longer exist.
                seen = {rank if rank < processes else 0 for rank in to_show}
                ranks = Ranks(
                    command,
                    environments,
                    seen,
                    log_dir,
                    appends,
                    cores,
                    absence.tell,
                    grace_seconds,
                )
                outcome = ranks.run()
            if not restarts.again(outcome, read_marks(marks)):
                break
    raise typer.Exit(outcome.exit_code)


def check_flags(flags: Mapping[str, Any], size: int, environ: Mapping[str, str]) -> None:
    """Validates the flags before any process is started.

    Raises:
        ConfigError: A flag is invalid, or incompatible with the number of processes.
    """
    if not flags:
        return
    # The script may still set default_partition, so it is not required here.
    known = {"auto_partition": True, **flags} if "default_partition" not in flags else flags
    config = Config.resolve(None, flags=known, environ=environ)
    if "partitions" in flags:
        world.replica_size(size, config.partitions, config.processes_per_replica)


def _check_files(script: str, module: bool, log_dir: Path | None) -> None:
    """Reports faults of the script and log paths that would make every rank fail."""
    faults = []
    path = Path(script)
    if not module and not _exists(path):
        faults.append(
            f"there is no file {shown(script)} in {Path.cwd()}; give the path of a Python script, "
            "or -m and the name of a module"
        )
    elif not module and path.is_dir() and not (path / "__main__.py").exists():
        faults.append(f"the directory {shown(script)} has no __main__.py; name a script in it")
    if log_dir is not None:
        try:
            log_dir.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            faults.append(
                f"--log-dir {shown(str(log_dir))} cannot be made or is no directory ({reason})"
            )
    if faults:
        raise LaunchError(f"opensmp run: {'; '.join(faults)}.")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # e.g. a name that is too long
        return False


def _check_seconds(join_seconds: float | None, idle_seconds: float | None) -> None:
    """Reports time limits that ranks would not accept."""
    faults = []
    if join_seconds is not None and not join_seconds <= LONGEST_JOIN_SECONDS:
        faults.append(
            f"--join-seconds {join_seconds:g}; expected at least 1 and at most "
            f"{LONGEST_JOIN_SECONDS}"
        )
    if idle_seconds is not None and not idle_seconds < math.inf:
        faults.append(f"--idle-seconds {idle_seconds:g}; expected at least 0; 0 means for ever")
    if faults:
        raise LaunchError(f"opensmp run: {'; '.join(faults)}.")


def environment(
    environ: Mapping[str, str],
    *,
    rank: int,
    size: int,
    port: int,
    token: str,
    flags: Mapping[str, Any],
    restart: int = 0,
    join_seconds: float | None = None,
    idle_seconds: float | None = None,
    grace_seconds: float = GRACE_SECONDS,
    marks: str | None = None,
) -> dict[str, str]:
    """Environment variables of one rank.

    Variables that the user has set are kept. Thread counts are left to `smp.init`, which knows the
    number of partitions per process.

    Args:
        environ: The launcher's own environment.
        rank: The rank.
        size: Number of ranks, all on this machine.
        port: Port of the rendezvous at rank 0.
        token: Secret of the run.
        flags: Configuration keys that were given as flags.
        restart: Number of restarts before this run.
        join_seconds: Timeout of `smp.init` for the other ranks.
        idle_seconds: Timeout while all ranks wait and none computes.
        grace_seconds: Time that ranks have to exit after a signal.
        marks: Directory in which ranks record that they have called `smp.init`.
    """
    own = {
        "RANK": rank,
        "SIZE": size,
        "LOCAL_RANK": rank,
        "LOCAL_SIZE": size,
        "MEETING": f"127.0.0.1:{port}",
        "TOKEN": token,
        "FLAGS": json.dumps(dict(flags)),
        "RESTART": restart,
        "GRACE_SECONDS": grace_seconds,  # scripts may read how long they have to save
    }
    if join_seconds is not None:
        own["JOIN_SECONDS"] = join_seconds
    if marks is not None:
        own["MARKS"] = marks
    inherited = {k: v for k, v in environ.items() if not k.startswith(LAUNCHER_PREFIX)}
    return {
        **_MALLOC,
        "PYTHONUNBUFFERED": "1",
        "TF_CPP_MIN_LOG_LEVEL": "1",  # otherwise every rank logs how it joined
        **inherited,
        **{f"{LAUNCHER_PREFIX}{name}": str(value) for name, value in own.items()},
        **({} if idle_seconds is None else {IDLE_VARIABLE: str(idle_seconds)}),
    }


def share_of_cores(cores: set[int], size: int) -> list[set[int]]:
    """Cores of each rank; ranks share a core only if there are fewer cores than ranks.

    Example:
        ```python
        share_of_cores({0, 1, 2, 3}, 2)  # [{0, 1}, {2, 3}]
        ```
    """
    ordered = sorted(cores)
    each = max(1, len(ordered) // size)
    return [
        {ordered[(rank * each + index) % len(ordered)] for index in range(each)}
        for rank in range(size)
    ]
