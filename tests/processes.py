"""Real processes for tests: started together, bounded in time, and always reaped.

results = run_ranks("import opensmp as smp; smp.init(); print(smp.rank())", 2)
assert [r.code for r in results] == [0, 0]
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from forks import Forked, prepare, start_rank

from opensmp.cli.run import environment
from opensmp.distributed.launch.meeting.rendezvous import reserve_port

ROOT = Path(__file__).resolve().parent.parent
LIMIT_SECONDS = 500.0
"""Less than pytest gives a test, and so much that a machine may have much else to do."""

FORKS = os.environ.get("TESTS_FORKS") == "1"
"""Whether ranks are forked unless a test says otherwise."""

NOISE = (
    "WARNING: All log messages before absl",
    "oneDNN custom operations are on",
    "opensmp info: ",
)


class RankResult(NamedTuple):
    """How one rank ended; `seconds` since the ranks were started, `at` by time.time()."""

    rank: int
    code: int
    output: str
    seconds: float
    at: float

    @property
    def lines(self) -> list[str]:
        return self.output.splitlines()


class LaunchResult(NamedTuple):
    """How a command ended."""

    code: int
    stdout: str
    stderr: str
    seconds: float


def environ_of_tests(extra: Mapping[str, Any] | None = None) -> dict[str, str]:
    """An environment without launchers and configurations, on the CPU, with `src` importable."""
    dropped = (
        "OPENSMP_",
        "SM_",
        "OMPI_",
        "PMI",
        "SLURM_",
        "TF_CONFIG",
        "RANK",
        "WORLD_SIZE",
        "MASTER_",
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    clean.update(
        TF_CPP_MIN_LOG_LEVEL="3",
        CUDA_VISIBLE_DEVICES="",
        PYTHONPATH=os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")]),
        PYTHONUNBUFFERED="1",
    )
    clean.update({k: str(v) for k, v in (extra or {}).items()})
    return clean


def run_ranks(
    script: str,
    n: int,
    config: Mapping[str, Any] | None = None,
    *,
    args: Sequence[Any] = (),
    environ: Mapping[str, Any] | Callable[[int], Mapping[str, Any]] | None = None,
    own_variables: bool = True,
    join_seconds: float = 240.0,
    lost: Collection[int] = (),
    seconds: float = LIMIT_SECONDS,
    fresh: bool = not FORKS,
) -> list[RankResult]:
    """Runs a script in n ranks without the launcher, so that nobody but they end them.

    Args:
        script: Python source, or the path of a file.
        n: Number of ranks.
        config: Keys of the configuration, as the launcher's flags give them.
        args: Arguments of the script.
        environ: More variables, for all ranks or by rank.
        own_variables: Whether the variables of `opensmp run` are set.
        join_seconds: How long ranks wait for each other.
        lost: Ranks that never end by themselves, and are killed when all others have ended.
        seconds: After this the test fails, and all are killed.
        fresh: Whether each rank is an interpreter that was started for it, as tests of what
            happens at the start or the end of a process need. Else ranks may be forked from a
            process that has imported TensorFlow and Keras, see `forks`; so they are by default
            where TESTS_FORKS=1.
    """
    token = secrets.token_hex(8)
    reservation, port = reserve_port("127.0.0.1")
    with tempfile.TemporaryDirectory() as folder, reservation:
        path = _as_file(script, folder)
        processes: list[subprocess.Popen[bytes] | Forked] = []
        files = []
        variables_of = functools.partial(
            _environ_of, n=n, config=config, port=port, token=token, join_seconds=join_seconds
        )
        extra = environ if callable(environ) else lambda rank: environ
        environs = [
            variables_of(rank, extra=extra(rank), own_variables=own_variables) for rank in range(n)
        ]
        if not fresh:
            prepare(variables_of(0, extra=None, own_variables=True), environs)
        began = time.monotonic()
        try:
            for rank, variables in enumerate(environs):
                file = open(Path(folder) / f"rank-{rank}.log", "w+b")  # noqa: SIM115
                files.append(file)
                command = [path, *map(str, args)]
                forked = None if fresh else start_rank(rank, command, variables, folder, file)
                processes.append(forked or _start(command, variables, folder, file))
            ends = _wait(processes, lost, began + seconds)
        finally:
            _reap(processes)
        outputs = [_read(file) for file in files]
        if any(end is None for end in ends):
            raise AssertionError(
                f"ranks {[r for r, end in enumerate(ends) if end is None]} did not end within "
                f"{seconds} s\n" + "\n".join(f"--- rank {r}\n{o}" for r, o in enumerate(outputs))
            )
        shift = time.time() - time.monotonic()
        return [
            RankResult(
                rank, process.returncode, outputs[rank], ends[rank] - began, ends[rank] + shift
            )
            for rank, process in enumerate(processes)
        ]


def check_ranks(script: str, n: int, *args: Any, **kwargs: Any) -> list[RankResult]:
    """`run_ranks`, where all ranks must end well."""
    results = run_ranks(script, n, *args, **kwargs)
    bad = [result for result in results if result.code]
    assert not bad, "\n".join(f"--- rank {r.rank}, exit code {r.code}\n{r.output}" for r in results)
    return results


def launch(
    script: str,
    flags: Sequence[Any],
    *,
    args: Sequence[Any] = (),
    environ: Mapping[str, Any] | None = None,
    command: Sequence[Any] = (sys.executable, "-m", "opensmp", "run"),
    seconds: float = LIMIT_SECONDS,
    meanwhile: Callable[[subprocess.Popen[str]], None] | None = None,
) -> LaunchResult:
    """Runs a script under a launcher: `opensmp run`, or another command.

    `meanwhile` is called with the launcher's process once it has started.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = _as_file(script, folder)
        began = time.monotonic()
        process = subprocess.Popen(
            [*map(str, command), *map(str, flags), path, *map(str, args)],
            env=environ_of_tests(environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            cwd=folder,
        )
        try:
            if meanwhile is not None:
                meanwhile(process)
            stdout, stderr = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.terminate()  # the launcher ends its ranks
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=10)
            raise
        finally:
            _reap([process])
        return LaunchResult(
            process.returncode, _quiet(stdout), _quiet(stderr), time.monotonic() - began
        )


def descendants(parent: int) -> list[int]:
    """Process ids of all that `parent` started, at any depth."""
    found: list[int] = []
    for task in Path(f"/proc/{parent}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *descendants(child)]
    return found


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# ---------------------------------------------------------------------------------- helpers


def _as_file(script: str, folder: str) -> str:
    if "\n" not in script and script.endswith(".py"):
        return script
    path = Path(folder) / "script.py"
    path.write_text(textwrap.dedent(script))
    return str(path)


def _environ_of(
    rank: int, *, extra: Mapping[str, Any] | None, own_variables: bool, **run: Any
) -> dict[str, str]:
    variables = environ_of_tests(extra)
    if not own_variables:
        return variables
    size, flags = run.pop("n"), dict(run.pop("config") or {})
    return environment(variables, rank=rank, size=size, flags=flags, **run)


def _start(
    command: Sequence[str], variables: Mapping[str, str], folder: str, output: IO[bytes]
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, *command],
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        cwd=folder,
    )


def _wait(
    processes: Sequence[subprocess.Popen[bytes] | Forked], lost: Collection[int], deadline: float
) -> list[float | None]:
    ends: list[float | None] = [None] * len(processes)
    while time.monotonic() < deadline:
        for rank, process in enumerate(processes):
            if ends[rank] is None and process.poll() is not None:
                ends[rank] = time.monotonic()
        if all(end is not None or rank in lost for rank, end in enumerate(ends)):
            return [end or time.monotonic() for end in ends]
        time.sleep(0.02)
    return ends


def _reap(processes: Sequence[subprocess.Popen[Any] | Forked]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)


def _read(file: Any) -> str:
    with file:
        file.seek(0)
        return _quiet(file.read().decode(errors="replace"))


def _quiet(text: str) -> str:
    return "".join(
        line for line in text.splitlines(keepends=True) if not any(n in line for n in NOISE)
    )
