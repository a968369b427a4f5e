"""`opensmp run`: starts one process per rank on this machine."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from opensmp.base.message_text import sentence, shown
from opensmp.cli.options import checking, command, key_option
from opensmp.cli.running.process_group import GRACE_SECONDS, Ranks, RunResult
from opensmp.cli.running.restarts import Restarts, known_layout
from opensmp.cli.running.run_options import RunOptions
from opensmp.compiler.schedule.own_schedule import check_number, read_orders
from opensmp.config import IDLE_VARIABLE, LAUNCHER_PREFIX, Config
from opensmp.config.keys import KEYS
from opensmp.distributed import world
from opensmp.distributed.launch import horovod_finder
from opensmp.distributed.launch.exit_notice import ExitNotifier
from opensmp.distributed.launch.init_markers import clear_marks, read_marks
from opensmp.distributed.launch.launch import LONGEST_JOIN_SECONDS
from opensmp.distributed.launch.meeting import rendezvous
from opensmp.errors import LaunchError

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
    """Starts a script once per rank on this machine.

    Options come before the script; what comes after it belongs to the script. If a rank
    fails, all ranks are ended, its error is printed last, and its exit code is returned.
    """
    with checking():
        check_flags(options.flags, options.processes, os.environ)
        _check_files(options.script, options.module, options.log_dir)
        _check_seconds(options.join_seconds, options.idle_seconds)
        _check_ranks(options)
    restarts = Restarts(
        options.max_restarts, options.processes, options.min_procs, known_layout(options.flags)
    )
    # Reserved across restarts, so that all runs meet at the same port.
    reservation, port = rendezvous.reserve_port("127.0.0.1")
    with reservation, tempfile.TemporaryDirectory(prefix="opensmp-run-") as marks:
        while True:
            clear_marks(marks)
            outcome = _run_once(options, restarts.size, restarts.number, port, marks)
            if not restarts.again(outcome, read_marks(marks)):
                break
    raise typer.Exit(outcome.exit_code)


def _run_once(options: RunOptions, size: int, restart: int, port: int, marks: str) -> RunResult:
    """Starts `size` ranks and waits for their end."""
    token = secrets.token_hex(16)  # keeps processes of an earlier run from joining
    environments = [
        environment(
            os.environ,
            rank=rank,
            size=size,
            port=port,
            token=token,
            flags=options.flags,
            restart=restart,
            join_seconds=options.join_seconds,
            idle_seconds=options.idle_seconds,
            grace_seconds=options.grace_seconds,
            marks=marks,
        )
        for rank in range(size)
    ]
    cores = share_of_cores(os.sched_getaffinity(0), size) if options.bind_cores else None
    # With fewer ranks after a restart, the rank to show may no longer exist.
    shown_rank = options.show_rank if options.show_rank < size else 0
    with contextlib.closing(ExitNotifier(port, token, size)) as absence:
        ranks = Ranks(
            _command(options),
            environments,
            set(range(size)) if options.all_output else {shown_rank},
            options.log_dir,
            restart > 0,
            cores,
            absence.tell,
            options.grace_seconds,
        )
        return ranks.run()


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
        _check_schedule(config, "partitions" in flags)


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


def _check_schedule(config: Config, with_partitions: bool) -> None:
    """Reports faults of a schedule's file that every rank would meet."""
    path = config.pipeline
    if isinstance(path, str) and path.endswith(".json"):
        orders = len(read_orders(path))
        check_number(path, orders, config.partitions if with_partitions else orders)


def _check_files(script: str, module: bool, log_dir: Path | None) -> None:
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
        raise LaunchError(f"opensmp run: {sentence(faults)}")


def _check_ranks(options: RunOptions) -> None:
    """Reports numbers of ranks that contradict each other."""
    processes, least, restarts = options.processes, options.min_procs, options.max_restarts
    if least is not None and (least > processes or not restarts):
        raise LaunchError(
            f"--min-procs {least} with -n {processes} and --max-restarts {restarts}. "
            "Expected: no more than -n says, and how often ranks may be started again, such as "
            "--max-restarts 10."
        )
    if options.show_rank >= processes:
        raise LaunchError(
            f"--show-rank {options.show_rank}: there is no such rank. Expected: 0 to "
            f"{processes - 1}."
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
    malloc = {**_MALLOC, **(_ONE_ARENA if len(os.sched_getaffinity(0)) < 2 * size else {})}
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
