from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from processes import alive, descendants, launch
from typer.testing import CliRunner

from opensmp.cli import app
from opensmp.cli.run import environment, share_of_cores
from opensmp.config import Config
from opensmp.errors import ConfigError, LaunchError

# ----------------------------------------------------------------------------- without ranks


def test_environment_of_a_rank_says_where_the_others_are():
    made = environment(
        {"PATH": "/bin", "OPENSMP_RUN_RANK": "9", "MALLOC_TOP_PAD_": "1"},
        rank=1,
        size=2,
        port=4711,
        token="secret",
        flags={"partitions": 2},
        restart=3,
        idle_seconds=9.0,
    )
    assert made["OPENSMP_RUN_RANK"] == "1"
    assert made["OPENSMP_RUN_MEETING"] == "127.0.0.1:4711"
    assert made["OPENSMP_RUN_RESTART"] == "3"
    assert made["OPENSMP_IDLE_SECONDS"] == "9.0"
    assert json.loads(made["OPENSMP_RUN_FLAGS"]) == {"partitions": 2}
    assert made["MALLOC_TOP_PAD_"] == "1"  # what the user has set stays
    assert made["MALLOC_TRIM_THRESHOLD_"] == str(1 << 30)
    # They are no keys of the configuration.
    assert Config.resolve(environ=made) == Config(partitions=1)


@pytest.mark.parametrize(
    ("cores", "size", "arenas"), [(2, 2, "1"), (3, 2, "1"), (4, 2, None), (1, 1, "1"), (8, 1, None)]
)
def test_ranks_with_one_core_each_have_one_arena(monkeypatch, cores, size, arenas):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    made = environment({}, rank=0, size=size, port=1, token="", flags={})
    assert made.get("MALLOC_ARENA_MAX") == arenas
    kept = {"MALLOC_ARENA_MAX": "7"}
    assert environment(kept, rank=0, size=size, port=1, token="", flags={}).items() >= kept.items()


@pytest.mark.parametrize(
    ("cores", "size", "shares"),
    [
        ({0, 1, 2, 3}, 2, [{0, 1}, {2, 3}]),
        ({0, 1, 2}, 2, [{0}, {1}]),
        ({4, 5}, 4, [{4}, {5}, {4}, {5}]),
    ],
)
def test_ranks_share_cores_only_when_there_are_too_few(cores, size, shares):
    assert share_of_cores(cores, size) == shares


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["-n", "4", "--partitions", "3"], "partitions=3 is not possible with 4 processes"),
        (["-n", "2", "--microbatches", "0"], "microbatches (flag): received 0"),
        (["-n", "2", "--pipeline", "simpel"], "did you mean 'simple'?"),
    ],
)
def test_wrong_flags_are_told_before_anything_is_started(flags, part):
    result = CliRunner().invoke(app, ["run", *flags, "no_such_script.py"])
    assert isinstance(result.exception, ConfigError)
    assert part in str(result.exception)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["a" * 5000], "there is no file"),
        (["--join-seconds", "inf", __file__], "--join-seconds inf"),
        (["--join-seconds", "1e7", __file__], "--join-seconds 1e+07"),
        (["--idle-seconds", "inf", __file__], "--idle-seconds inf"),
        (["--log-dir", "a" * 5000, __file__], "cannot be made or is no directory"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_words_that_no_run_can_begin_with_are_refused(words, part):
    result = CliRunner().invoke(app, ["run", *words])
    assert isinstance(result.exception, LaunchError)
    assert part in str(result.exception)
    assert len(str(result.exception)) < 1000


def test_number_of_ranks_is_bounded():
    result = CliRunner().invoke(app, ["run", "-n", str(10**18), "--partitions", "3", __file__])
    assert result.exit_code == 2
    assert "4096" in result.output


# -------------------------------------------------------------------------------- with ranks

# Without smp: the launcher alone is tested, and fast.
PLAIN = """
import os, signal, subprocess, sys, time
rank, size = os.environ["OPENSMP_RUN_RANK"], int(os.environ["OPENSMP_RUN_SIZE"])
row = sys.argv[1]
print("rank", rank, "of", size, sys.argv[2:], flush=True)
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
open(f"started {rank}", "w").close()
if rank == "1":
    while len([name for name in os.listdir() if "started" in name]) < size:
        time.sleep(0.02)
    time.sleep(0.5)
    if row == "seven":
        print("the reason", file=sys.stderr)
        sys.exit(7)
    if row == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if row == "once" and os.environ["OPENSMP_RUN_RESTART"] == "0":
        sys.exit(3)
if row in ("seven", "kill", "once", "wait") and os.environ["OPENSMP_RUN_RESTART"] == "0":
    time.sleep(600)
child.kill()
child.wait()
"""


def test_one_rank_is_shown_and_arguments_reach_the_script():
    result = launch(PLAIN, ["-n", "2"], args=["end", "--partitions", "x"])
    assert result.code == 0, result.stderr
    assert result.stdout.splitlines() == ["rank 0 of 2 ['--partitions', 'x']"]
    assert "the program never called smp.init, so that its 2 processes knew" in result.stderr


def test_all_ranks_are_shown_with_their_number_and_logged(tmp_path):
    result = launch(PLAIN, ["-n", "2", "--all-output", "--log-dir", tmp_path], args=["end"])
    assert sorted(result.stdout.splitlines()) == ["[0] rank 0 of 2 []", "[1] rank 1 of 2 []"]
    assert "rank 1 of 2 []" in (tmp_path / "rank-1.log").read_text()


@pytest.mark.parametrize(
    ("row", "code", "told"),
    [
        ("seven", 7, "opensmp run: rank 1 failed with exit code 7; its last lines:"),
        ("kill", 137, "opensmp run: rank 1 was ended by SIGKILL"),
    ],
)
def test_failing_rank_ends_all_and_has_the_last_word(row, code, told):
    left: list[int] = []

    def look(process: subprocess.Popen[str]) -> None:
        while process.poll() is None:
            left[:] = list({*left, *descendants(process.pid)})
            time.sleep(0.05)

    result = launch(PLAIN, ["-n", "3"], args=[row], meanwhile=look)
    assert result.code == code
    assert told in result.stderr
    if row == "seven":
        assert result.stderr.splitlines()[-1] == "[1] the reason"
    assert len(left) >= 7  # three ranks, a child of each, and their guardian
    assert [process for process in left if alive(process)] == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_are_forwarded_and_nothing_is_left(number, code):
    left: list[int] = []

    def interrupt(process: subprocess.Popen[str]) -> None:
        while len(left) < 5:  # two ranks, a child of each, and their guardian
            left[:] = descendants(process.pid)
            time.sleep(0.05)
        process.send_signal(number)

    result = launch(PLAIN, ["-n", "2"], args=["wait"], meanwhile=interrupt)
    assert result.code == code
    assert f"forwarding {signal.Signals(number).name} to all ranks" in result.stderr
    assert [process for process in left if alive(process)] == []


# What scripts start: workers that hear no SIGTERM, have a session of their own, or an environment.
FAMILY = """
import os, signal, subprocess, sys, time
folder = sys.argv[1]
deaf = (
    "import os, signal, subprocess, sys, time\\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\\n"
    "if sys.argv[2] == 'parent':\\n"
    "    subprocess.Popen([sys.executable, '-c', sys.argv[3], sys.argv[1], 'child', ''])\\n"
    "open(os.path.join(sys.argv[1], str(os.getpid())), 'w').close()\\n"
    "time.sleep(600)\\n"
)
command = [sys.executable, "-c", deaf, folder, "parent", deaf]
subprocess.Popen(command)
subprocess.Popen(command, start_new_session=True)
subprocess.Popen(command, process_group=0) if sys.version_info >= (3, 11) else None
subprocess.Popen(command, env={})
open(os.path.join(folder, str(os.getpid())), "w").close()
time.sleep(600)
"""


def test_all_that_ranks_have_started_ends_with_a_launcher_that_is_killed(tmp_path):
    count = 2 * (1 + 2 * (4 if sys.version_info >= (3, 11) else 3))
    guardians: list[int] = []

    def kill(process: subprocess.Popen[str]) -> None:
        end = time.monotonic() + 240
        while len(list(tmp_path.iterdir())) < count and time.monotonic() < end:
            time.sleep(0.05)
        guardians[:] = descendants(process.pid)
        process.kill()

    launch(FAMILY, ["-n", "2"], args=[tmp_path], meanwhile=kill)
    family = [int(path.name) for path in tmp_path.iterdir()]
    assert len(family) == count
    end = time.monotonic() + 120
    while any(map(alive, [*family, *guardians])) and time.monotonic() < end:
        time.sleep(0.05)
    assert [process for process in [*family, *guardians] if alive(process)] == []


def test_a_launcher_that_ends_leaves_no_guardian():
    left: list[int] = []

    def look(process: subprocess.Popen[str]) -> None:
        while process.poll() is None:
            left[:] = list({*left, *descendants(process.pid)})
            time.sleep(0.02)

    assert launch("import time; time.sleep(0.5)\n", ["-n", "1"], meanwhile=look).code == 0
    assert len(left) >= 2
    assert not any(map(alive, left))


# A script that hears SIGTERM, and takes its time.
SAVING = """
import os, signal, sys, time
terms = []
signal.signal(signal.SIGTERM, lambda *_: terms.append(time.time()))
signal.signal(signal.SIGINT, lambda *_: terms.append(time.time()))
print("up", os.environ["OPENSMP_RUN_GRACE_SECONDS"], flush=True)
while not terms:
    time.sleep(0.01)
end = time.time() + float(sys.argv[1])
while time.time() < end:
    time.sleep(0.05)
print("saved", flush=True)
sys.exit(int(sys.argv[2]) if os.environ["OPENSMP_RUN_RANK"] == "1" else 0)
"""


def _ended_by(number: int, flags: list[str], args: list[str], environ: dict[str, str]) -> Any:
    """How ranks ended that were sent a signal when all were up."""

    def send(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for _ in range(2):
            assert "up" in process.stdout.readline()
        process.send_signal(number)

    return launch(SAVING, ["-n", "2", "-a", *flags], args=args, environ=environ, meanwhile=send)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_ends_well_after_a_signal_returns_0(number):
    result = _ended_by(number, [], ["0.2", "0"], {})
    assert sorted(result.stdout.splitlines()) == ["[0] saved", "[1] saved"]
    assert result.code == 0, result.stderr


def test_a_rank_that_fails_after_a_signal_makes_it_the_signals_code():
    result = _ended_by(signal.SIGTERM, [], ["0.2", "3"], {})
    assert result.code == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("flags", "environ", "saved"),
    [
        (["--grace-seconds", "1"], {}, False),
        (["--grace-seconds", "100"], {}, True),
        ([], {"OPENSMP_RUN_GRACE_SECONDS": "1"}, False),
        (["--grace-seconds", "100"], {"OPENSMP_RUN_GRACE_SECONDS": "1"}, True),
    ],
)
def test_the_time_between_the_signal_and_the_end_is_an_option(flags, environ, saved):
    result = _ended_by(signal.SIGTERM, flags, ["5" if saved else "600", "0"], environ)
    assert ("saved" in result.stdout) == saved
    assert result.code == (0 if saved else 128 + signal.SIGTERM), result.stderr


@pytest.mark.parametrize("seconds", ["nan", "-1", "soon"])
def test_seconds_are_numbers(seconds):
    result = CliRunner().invoke(app, ["run", "--grace-seconds", seconds, __file__])
    assert result.exit_code == 2
    assert "--grace-seconds" in result.output


def test_all_ranks_are_restarted_after_a_failure():
    result = launch(PLAIN, ["-n", "2", "--max-restarts", "2"], args=["once"])
    assert result.code == 0, result.stderr
    assert "restart 1 of 2: all ranks are started again" in result.stderr
    assert "restart 2" not in result.stderr
    assert result.stdout.splitlines() == ["rank 0 of 2 []"] * 2


# ------------------------------------------------------------------- the launchers of others

RANKS = """
import opensmp as smp
smp.init()
print(sorted(smp.allgather((smp.rank(), smp.local_rank(), smp.mp_rank(), smp.get_dp_group()))))
"""
EXPECTED = "[(0, 0, 0, [0]), (1, 1, 1, [1])]"
AS_ROOT = {
    f"{name}_ALLOW_RUN_AS_ROOT{suffix}": "1"
    for name in ("OMPI", "PRTE")
    for suffix in ("", "_CONFIRM")
}


def _find(name: str) -> str | None:
    return shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def test_flags_of_the_launcher_reach_smp_init():
    result = launch(RANKS, ["-n", "2", "--partitions", "2"])
    assert (result.code, result.stdout.splitlines()) == (0, [EXPECTED]), result.stderr


@pytest.mark.skipif(_find("prterun") is None, reason="Open MPI 5 is not installed")
def test_open_mpi_starts_ranks():
    command = [_find("prterun"), "--personality", "ompi", "--map-by", ":OVERSUBSCRIBE"]
    result = launch(
        RANKS,
        ["-n", "2", sys.executable],
        command=command,
        environ={**AS_ROOT, "OPENSMP_PARTITIONS": "2"},
    )
    # Launchers may mix the lines of ranks.
    assert (result.code, result.stdout.count(EXPECTED)) == (0, 2), result.stderr


@pytest.mark.skipif(_find("mpiexec.hydra") is None, reason="MPICH is not installed")
def test_mpich_starts_ranks():
    result = launch(
        RANKS,
        ["-n", "2", sys.executable],
        command=[_find("mpiexec.hydra")],
        environ={"OPENSMP_PARTITIONS": "2"},
    )
    # Launchers may mix the lines of ranks.
    assert (result.code, result.stdout.count(EXPECTED)) == (0, 2), result.stderr


# ------------------------------------------------------------------- as under Python itself

INITIALISED = "import sys, opensmp as smp\nsmp.init()\nrank = smp.rank()\n"


def test_annotations_are_what_python_makes_of_them():
    result = launch("def f(x: int): pass\nprint(f.__annotations__)\n", ["-n", "1"])
    assert result.stdout.strip() == "{'x': <class 'int'>}"


def test_errors_are_shown_as_python_shows_them():
    result = launch("def fail():\n    return 1 / 0\n\nfail()\n", ["-n", "1"])
    assert "line 4, in <module>" in result.stderr
    assert "line 2, in fail" in result.stderr
    assert "ZeroDivisionError: division by zero" in result.stderr
    assert "opensmp/compat" not in result.stderr


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("if rank: raise SystemExit(3)\nsmp.barrier()", 3),
        ("if rank: exit(3)\nsmp.barrier()", 3),
        # Neither one that was caught nor one of a thread is the program's.
        (
            "try:\n    sys.exit(3)\nexcept SystemExit:\n    print('caught')\n"
            "import threading\nthreading.Thread(target=sys.exit, args=[4]).start()",
            0,
        ),
        ("sys.excepthook = lambda *_: None\nif rank: 1 / 0\nsmp.barrier()", 1),
    ],
    ids=["SystemExit", "exit", "caught or in a thread", "other hook"],
)
def test_exit_code_is_that_of_the_program(ending, code):
    result = launch(INITIALISED + ending, ["-n", "2"])
    assert result.code == code, result.stderr
    assert "never called smp.init" not in result.stderr
    if code == 1:
        assert "rank 1 failed: ZeroDivisionError" in result.stderr


def test_a_child_that_was_forked_ends_and_its_signals_are_its_own():
    script = (
        INITIALISED
        + """
import os, signal, time
ready, tell = os.pipe()
for end in ("exit", "signal"):
    child = os.fork()
    if not child:
        if end == "exit":
            sys.exit(0)
        signal.signal(signal.SIGINT, lambda *_: os._exit(4))
        os.write(tell, b".")
        time.sleep(600)
    if end == "signal":
        os.read(ready, 1)
        os.kill(child, signal.SIGINT)
    print(end, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
time.sleep(2.5)
"""
    )
    result = launch(script, ["-n", "2"])
    assert result.code == 0, result.stderr
    assert result.stdout.splitlines() == ["exit 0", "signal 4"]


def test_a_handler_that_was_set_late_is_left_to_do_its_work():
    script = (
        INITIALISED
        + """
import signal, time
stopped = []
signal.signal(signal.SIGINT, lambda *_: stopped.append(1))
smp.barrier()
print("ready", flush=True)
while not stopped:
    time.sleep(0.05)
time.sleep(3.0)
print("saved", flush=True)
"""
    )

    def interrupt(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        while "ready" not in process.stdout.readline():
            pass
        process.send_signal(signal.SIGINT)

    result = launch(script, ["-n", "2"], meanwhile=interrupt)
    assert "saved" in result.stdout


def test_ignored_hangups_stay_ignored():
    script = "import time\nprint('up', flush=True)\ntime.sleep(1.5)\nprint('done')\n"
    nohup = ["nohup", sys.executable, "-m", "opensmp", "run"]

    def hang_up(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        assert "up" in process.stdout.readline()
        process.send_signal(signal.SIGHUP)

    result = launch(script, ["-n", "1"], command=nohup, meanwhile=hang_up)
    assert (result.code, result.stdout.strip()) == (0, "done")


def test_processes_of_others_are_left_alone():
    """A shell that becomes the launcher leaves it its children."""
    sleeping = 'setsid sleep 600 >/dev/null 2>&1 & echo $!; exec "$@"'
    shell = ["sh", "-c", sleeping, "sh", sys.executable, "-m", "opensmp"]
    result = launch("print('hi')\n", ["run", "-n", "1"], command=shell)
    sleeper, line = result.stdout.splitlines()
    try:
        assert line == "hi"
        assert alive(int(sleeper))
    finally:
        os.kill(int(sleeper), signal.SIGKILL)


def test_an_error_on_stdout_is_not_hidden_by_what_tensorflow_tells():
    script = """
import sys
print("WARNING: All log messages before absl::InitializeLog() is called", file=sys.stderr)
print("I0000 00:00:1795853418.946065   30899 port.cc:153] oneDNN", file=sys.stderr)
print("the directory is empty")
sys.exit(3)
"""
    result = launch(script, ["-n", "1"])
    assert result.code == 3
    assert result.stderr.splitlines()[-1] == "[0] the directory is empty"


def test_long_lines_arrive_whole():
    result = launch("print('x' * 3_000_000)\nprint('end', end='')\n", ["-n", "1"])
    assert result.stdout.splitlines() == ["x" * 3_000_000, "end"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["nothing.py"], "there is no file 'nothing.py'"),
        (["."], "the directory '.' has no __main__.py"),
        (["--log-dir", "/dev/null/x", __file__], "--log-dir '/dev/null/x' cannot be made"),
        (["-n", "2", "--show-rank", "2", __file__], "--show-rank 2: there is no such rank"),
        (["--plan", "lost.json", __file__], "--plan: there is no file 'lost.json' in"),
        (
            ["--plan", '{"one": ".", "two": "b.json"}', __file__],
            "there is no file '.', 'b.json' in",
        ),
    ],
)
def test_what_no_rank_could_begin_with_is_said_before(arguments, part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["run", *arguments])
    assert isinstance(result.exception, LaunchError)
    assert part in str(result.exception)


def test_join_seconds_may_come_from_the_environment():
    script = "import os, time\nif os.environ['OPENSMP_RUN_RANK'] == '1': time.sleep(600)\n"
    script += "import opensmp as smp\nsmp.init()\n"
    result = launch(script, ["-n", "2"], environ={"OPENSMP_RUN_JOIN_SECONDS": "2"})
    assert result.code == 1
    assert "within 2 s of rank 0" in result.stderr
    assert "more time with --join-seconds" in result.stderr


@pytest.mark.parametrize(("absent", "late"), [(0, None), (1, None), (1, 2)])
def test_nobody_waits_for_a_rank_that_ended_before_smp_init(absent, late, tmp_path):
    script = f"""
    import os
    import pathlib
    import sys
    import time
    if os.environ["OPENSMP_RUN_RANK"] == "{absent}":
        sys.exit()
    import opensmp as smp
    smp.init  # imports TensorFlow, which may take one much longer than the other
    folder = pathlib.Path("{tmp_path}")
    (folder / os.environ["OPENSMP_RUN_RANK"]).touch()
    while len(list(folder.iterdir())) < 2:
        time.sleep(0.02)
    if os.environ["OPENSMP_RUN_RANK"] == "{late}":
        time.sleep(30)
    smp.init()
    """
    result = launch(script, ["-n", "3", "-a"])
    assert result.code == 1, result.stderr
    told = f"LaunchError: opensmp run: rank {absent} of 3 ended, with exit code 0, before it called"
    # Two seconds after one rank has failed the launcher ends the others. One that reaches smp.init
    # later than that has nothing to say, and those that do say something say this.
    errors = [line for line in result.stderr.splitlines() if "Error: " in line]
    assert errors, result.stderr
    assert [line for line in errors if told not in line] == []
    failed = re.search(r"opensmp run: rank (\d) failed", result.stderr)
    assert failed is not None, result.stderr
    assert any(line.startswith(f"[{failed[1]}]") for line in errors)
    assert f"rank {absent} had ended before, with exit code 0" in result.stderr
