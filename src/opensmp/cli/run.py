"""`opensmp run`: starts one process per rank, on this machine or on several."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from opensmp.base.message_text import sentence, shown
from opensmp.cli.options import checking, command, key_option
from opensmp.cli.running.node import Node, check_name
from opensmp.cli.running.over_ssh import run_on_hosts
from opensmp.cli.running.process_group import GRACE_SECONDS, Ranks, RunResult
from opensmp.cli.running.regroup import WAIT_SECONDS, Gathering, regroup
from opensmp.cli.running.restarts import Restarts, known_layout, makes_whole_replicas
from opensmp.cli.running.run_options import RunOptions
from opensmp.compiler.schedule.own_schedule import check_file
from opensmp.config import IDLE_VARIABLE, LAUNCHER_PREFIX, Config
from opensmp.config.keys import KEYS
from opensmp.config.sources import from_file
from opensmp.distributed import world
from opensmp.distributed.launch import horovod_finder
from opensmp.distributed.launch.environment import parse_address
from opensmp.distributed.launch.exit_notice import ExitNotifier
from opensmp.distributed.launch.init_markers import clear_marks, read_marks
from opensmp.distributed.launch.launch import LONGEST_JOIN_SECONDS
from opensmp.distributed.launch.meeting import rendezvous
from opensmp.errors import ConfigError, LaunchError

# Large tensors are allocated and freed in every step. If glibc returns the memory to the system
# each time, getting it back costs more than the transfer of the message.
_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_TOP_PAD_": str(16 << 20),
}

# Memory that is freed in an arena of glibc is used again in that arena only. Several arenas help
# threads that allocate at the same time, which those of a rank with one core do not.
_ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}


@command(RunOptions, [key_option(name) for name in KEYS])
def run(options: RunOptions) -> None:
    """Starts a script once per rank.

    All ranks are on this machine, or some on each of several: with --nnodes, --node-rank
    and --master the same command is given on each, with --hosts all are started from here.
    Options come before the script; what comes after it belongs to the script. If a rank
    fails, all ranks are ended, its error is printed last, and its exit code is returned.
    """
    if options.config is not None:
        with checking():
            flags = {**read_config(options.config, "opensmp run"), **options.flags}
        options = replace(options, flags=flags)
    if options.hosts is not None:
        raise typer.Exit(run_on_hosts(options))
    with checking():
        node = Node.of(options, os.environ)
    run_here(options, node)


def run_here(options: RunOptions, node: Node, restart: int = 0) -> None:
    """Starts the ranks of this machine, and ends with their exit code.

    `restart` is how often the run has been restarted before, on all machines.
    """
    with checking():
        check_flags(options.flags, node.size, os.environ)
        check_script(options.script, options.module, options.log_dir)
        _check_seconds(options.join_seconds, options.idle_seconds)
        _check_ranks(options, node)
        if node.meeting is not None:
            check_name(node.meeting)
    restarts = Restarts(
        options.max_restarts, options.processes, options.min_procs, known_layout(options.flags)
    )
    # Reserved across restarts, so that all runs meet at the same port.
    reservation, port = rendezvous.reserve_port("127.0.0.1")
    if node.meeting is None:
        node = replace(node, meeting=f"127.0.0.1:{port}")
    else:
        reservation.close()
    with reservation, tempfile.TemporaryDirectory(prefix="opensmp-run-") as marks:
        while True:
            clear_marks(marks)
            size = restarts.size if node.size == options.processes else node.size
            here = replace(node, size=size)
            outcome = _run_once(options, here, restarts.size, restart + restarts.number, marks)
            if not restarts.again(outcome, read_marks(marks)):
                break
            if options.min_nodes is not None:
                group = regroup(_gathering(options, node), restart + restarts.number)
                if group is None:
                    break
                node = replace(node, first_rank=group.first_rank, size=group.size)
                restarts.number = group.restart - restart
    raise typer.Exit(outcome.exit_code)


def _gathering(options: RunOptions, node: Node) -> Gathering:
    assert node.meeting is not None
    layout = known_layout(options.flags)
    return Gathering(
        node_rank=options.node_rank,
        nodes=node.size // options.processes,
        least=options.min_nodes or 1,
        processes=options.processes,
        meeting=node.meeting,
        secret=node.secret or "",
        seconds=options.join_seconds or WAIT_SECONDS,
        fits=lambda size: makes_whole_replicas(size, layout),
    )


def _run_once(options: RunOptions, node: Node, count: int, restart: int, marks: str) -> RunResult:
    """Starts `count` ranks here and waits for their end."""
    here = range(node.first_rank, node.first_rank + count)
    is_all = len(here) == node.size
    # Keeps processes of an earlier run from joining.
    token = secrets.token_hex(16) if is_all else node.token_of(restart)
    assert node.meeting is not None
    environments = [
        environment(
            os.environ,
            rank=rank,
            size=node.size,
            local=(rank - here[0], count),
            meeting=node.meeting,
            token=token,
            flags=options.flags,
            restart=restart,
            join_seconds=options.join_seconds,
            idle_seconds=options.idle_seconds,
            grace_seconds=options.grace_seconds,
            marks=marks,
        )
        for rank in here
    ]
    cores = share_of_cores(os.sched_getaffinity(0), count) if options.bind_cores else None
    # With fewer ranks after a restart, the rank to show may no longer exist.
    shown_rank = options.show_rank or 0
    shown_rank = shown_rank if shown_rank < node.size else 0
    host, port = parse_address(node.meeting)
    with contextlib.closing(ExitNotifier(port, token, node.size, host)) as absence:
        ranks = Ranks(
            _command(options),
            environments,
            set(here) if options.all_output else {shown_rank},
            options.log_dir,
            restart > 0,
            cores,
            absence.tell if token else None,
            options.grace_seconds,
            here[0],
            prefixed=options.all_output,
        )
        return ranks.run()


def read_config(path: Path, command: str) -> dict[str, Any]:
    """The keys in a configuration file; relative paths in it are those of the current directory."""
    faults: list[str] = []
    given = {each.key: each.value for each in from_file(path, faults)}
    unknown = [key for key in given if key not in KEYS]
    if unknown and not faults:
        Config.resolve(str(path))  # names the file, and accepts the keys of other libraries
    if faults:
        raise ConfigError(f"{command} --config: {sentence(faults)}")
    return given


def _command(options: RunOptions) -> list[str]:
    """The command line of a rank."""
    # Run as a file, not as a module: importing an opensmp module would import TensorFlow before the
    # script can set its environment variables.
    module = ["-m"] if options.module else []
    finder = [sys.executable, horovod_finder.__file__, *module]
    return [*finder, options.script, *(options.arguments or [])]


def check_flags(flags: Mapping[str, Any], size: int, environ: Mapping[str, str]) -> None:
    """Validates the flags before any process is started."""
    if not flags:
        return
    # The script may still set default_partition, so it is not required here.
    known = {"auto_partition": True, **flags} if "default_partition" not in flags else flags
    config = Config.resolve(None, flags=known, environ=environ)
    if "partitions" in flags:
        world.replica_size(size, config.partitions, config.processes_per_replica)
    if "plan" in flags:
        _check_plans(config.plan_paths)
    if "pipeline" in flags:
        check_file(config.pipeline, config.partitions if "partitions" in flags else None)


def _check_plans(paths: Sequence[str]) -> None:
    """Reports plan files that every rank would miss."""
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        listed = ", ".join(map(shown, missing))
        raise LaunchError(
            f"opensmp run: --plan: there is no file {listed} in {Path.cwd()}. Make one by `opensmp "
            "plan MODULE:FACTORY --batch N --partitions P --output plan.json`, or leave out the "
            "option: then each rank makes the same plan itself."
        )


def check_script(
    script: str, module: bool, log_dir: Path | None, name: str = "opensmp run"
) -> None:
    """Reports faults of the script and log paths that would make every rank fail."""
    faults = []
    path = Path(script)
    if not module and not os.path.exists(path):
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
        raise LaunchError(f"{name}: {sentence(faults)}")


def _check_ranks(options: RunOptions, node: Node) -> None:
    """Reports numbers of ranks that contradict each other."""
    processes, least, restarts = options.processes, options.min_procs, options.max_restarts
    if least is not None and (least > processes or not restarts):
        raise LaunchError(
            f"--min-procs {least} with -n {processes} and --max-restarts {restarts}. "
            "Expected: no more than -n says, and how often ranks may be started again, such as "
            "--max-restarts 10."
        )
    if options.show_rank is None:
        return
    if options.show_rank >= node.size:
        raise LaunchError(
            f"--show-rank {options.show_rank}: there is no such rank. Expected: 0 to "
            f"{node.size - 1}."
        )
    if options.all_output:
        raise LaunchError(
            f"--show-rank {options.show_rank} and --all-output contradict each other. Expected: "
            "one of them."
        )


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
        raise LaunchError(f"opensmp run: {sentence(faults)}")


def environment(
    environ: Mapping[str, str],
    *,
    rank: int,
    size: int,
    token: str,
    port: int = 0,
    meeting: str | None = None,
    local: tuple[int, int] | None = None,
    flags: Mapping[str, Any],
    restart: int = 0,
    join_seconds: float | None = None,
    idle_seconds: float | None = None,
    grace_seconds: float = GRACE_SECONDS,
    marks: str | None = None,
) -> dict[str, str]:
    """Environment variables of one rank.

    `local` is its rank among those of its machine, and their number; None if all are there.
    `meeting` is where rank 0 listens; None for `port` on this machine. An empty `token` is none.

    Variables that the user has set are kept. Thread counts are left to `smp.init`, which knows the
    number of partitions per process.
    """
    local_rank, local_size = local or (rank, size)
    own = {
        "RANK": rank,
        "SIZE": size,
        "LOCAL_RANK": local_rank,
        "LOCAL_SIZE": local_size,
        "MEETING": meeting or f"127.0.0.1:{port}",
        "FLAGS": json.dumps(dict(flags)),
        "RESTART": restart,
        "GRACE_SECONDS": grace_seconds,  # scripts may read how long they have to save
    }
    if token:
        own["TOKEN"] = token
    if join_seconds is not None:
        own["JOIN_SECONDS"] = join_seconds
    if marks is not None:
        own["MARKS"] = marks
    malloc = {**_MALLOC, **(_ONE_ARENA if len(os.sched_getaffinity(0)) < 2 * local_size else {})}
    inherited = {k: v for k, v in environ.items() if not k.startswith(LAUNCHER_PREFIX)}
    return {
        **malloc,
        "PYTHONUNBUFFERED": "1",
        "TF_CPP_MIN_LOG_LEVEL": "1",  # otherwise every rank logs how it joined
        **inherited,
        **{f"{LAUNCHER_PREFIX}{name}": str(value) for name, value in own.items()},
        **({} if idle_seconds is None else {IDLE_VARIABLE: str(idle_seconds)}),
    }


def share_of_cores(cores: set[int], size: int) -> list[set[int]]:
    """Cores of each rank; ranks share a core only if there are fewer cores than ranks."""
    ordered = sorted(cores)
    each = max(1, len(ordered) // size)
    return [
        {ordered[(rank * each + index) % len(ordered)] for index in range(each)}
        for rank in range(size)
    ]
