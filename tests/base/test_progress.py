from __future__ import annotations

import io
import logging
import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from opensmp.base import progress
from opensmp.base.progress import Clock, phase, say, set_verbosity, show, start


@pytest.fixture(autouse=True)
def logger(monkeypatch):
    """That of a program without handlers of its own, in which nothing was set.

    It is not registered: pytest adds its handlers to all loggers that are.
    """
    logger = logging.Logger("opensmp")
    logger.parent = logging.getLogger()
    logger.propagate = False
    monkeypatch.setattr(progress, "_state", progress._State())
    monkeypatch.setattr(progress, "_logger", logger)
    monkeypatch.delenv(progress.VARIABLE, raising=False)
    return logger


class Collected(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record):
        self.lines.append(f"{record.levelname} {record.getMessage()}")


def printed(capsys) -> list[str]:
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_lines_and_warnings_are_printed_by_default_and_details_are_not(capsys, logger):
    start(0)
    say("made %d partitions", 2)
    logger.warning("an odd thing")
    logger.info("a detail")
    assert printed(capsys) == ["opensmp info: made 2 partitions", "opensmp warning: an odd thing"]


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        ("debug", ["info: a line", "debug: d", "info: i", "warning: w", "error: e"]),
        ("info", ["info: a line", "info: i", "warning: w", "error: e"]),
        ("warning", ["warning: w", "error: e"]),
        ("Error", ["error: e"]),
        (" off ", []),
    ],
)
@pytest.mark.parametrize("by", ["call", "variable"])
def test_the_level_says_what_is_printed(capsys, logger, monkeypatch, level, shown, by):
    if by == "call":
        set_verbosity(level)
    else:
        monkeypatch.setenv("OPENSMP_LOG", level)
    start(0)
    say("a line")
    for name in ("debug", "info", "warning", "error"):
        getattr(logger, name)(name[0])
    assert printed(capsys) == [f"opensmp {line}" for line in shown]


def test_a_call_wins_over_the_variable_and_the_last_call_over_others(capsys, logger, monkeypatch):
    monkeypatch.setenv("OPENSMP_LOG", "off")
    set_verbosity("off")
    set_verbosity("info")
    start(0)
    say("a line")
    assert printed(capsys) == ["opensmp info: a line"]


@pytest.mark.parametrize("level", ["loud", "", None, 3, "INFO,DEBUG"])
def test_an_unknown_level_is_refused_with_the_levels_there_are(level):
    with pytest.raises(ValueError, match=r"'debug', 'info', 'warning', 'error', 'off'.*Received"):
        set_verbosity(level)


def test_an_unknown_level_in_the_variable_is_told_and_ignored(capsys, logger, monkeypatch):
    monkeypatch.setenv("OPENSMP_LOG", "loud")
    start(0)
    say("a line")
    first, second = printed(capsys)
    assert "OPENSMP_LOG: the level must be one of" in first
    assert "'loud'. It is ignored." in first
    assert second == "opensmp info: a line"


def test_only_rank_0_says_more_than_warnings(capsys, logger):
    start(1)
    say("a line")
    set_verbosity("debug")
    say("a line")
    logger.info("a detail")
    logger.warning("of this rank")
    assert printed(capsys) == ["opensmp warning: of this rank"]


@pytest.mark.parametrize("where", ["logger", "root"])
@pytest.mark.parametrize("level", [None, "info"])
def test_handlers_of_the_program_get_each_line_once_and_nothing_is_printed(
    capsys, logger, monkeypatch, where, level
):
    own = Collected()
    if where == "root":
        monkeypatch.setattr(logger, "propagate", True)
        monkeypatch.setattr(logging.getLogger(), "handlers", [own])
    else:
        logger.addHandler(own)
    logger.setLevel(logging.INFO)
    if level:
        set_verbosity(level)
    start(0)
    start(0)
    say("a line")
    logger.warning("an odd thing")
    assert own.lines == ["INFO a line", "WARNING an odd thing"]
    assert printed(capsys) == []


def test_a_program_that_logs_warnings_only_gets_no_lines(capsys, logger, monkeypatch):
    own = Collected()
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logging.getLogger(), "handlers", [own])  # its level is WARNING
    start(0)
    say("a line")
    assert (own.lines, printed(capsys)) == ([], [])


def test_a_closed_stderr_is_no_error(monkeypatch):
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        monkeypatch.setattr(sys, "stderr", stream)
        start(0)
        say("a line")
        with phase("tracing"):
            show("planning")


def test_phases_without_a_terminal_print_nothing(capsys, logger):
    start(0)
    with phase("tracing"), phase("planning"):
        show("compiling 1 of 2")
    with pytest.raises(KeyError), phase("tracing"):
        raise KeyError
    assert progress._state.phases == []
    assert printed(capsys) == []


def test_phases_of_other_threads_are_not_shown():
    def work():
        with phase("tracing"):
            found.append(list(progress._state.phases))

    found: list[list[str]] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [[]]


def test_a_clock_tells_seconds():
    assert str(Clock()) == "0.0 s"


PROGRAM = """
import sys, time
from opensmp.base import progress
progress.start(0)
with progress.phase("tracing [bold]model[/bold] 'x'"):
    time.sleep(0.4)
    with progress.phase("planning"):
        time.sleep(0.4)
    for i in range(12):
        progress.show(f"compiling {i + 1} of 12")
    print("from the model, " + "long " * 40)
    progress.say("planned %s", "word " * 40)
    time.sleep(0.4)
    print("without a line break", end="")
print("\\nafter", flush=True)
"""


def in_a_terminal(program: str, stdout: int | None = None, **environment: str) -> str:
    """What a program shows on a terminal of 80 columns, and not in `stdout` if there is one."""
    main, side = pty.openpty()
    paths = os.pathsep.join([str(Path(progress.__file__).parents[2])])
    env = {**os.environ, "PYTHONPATH": paths, "TERM": "xterm", "COLUMNS": "80", **environment}
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=stdout or side, stderr=side, stdin=side, env=env
    )
    os.close(side)
    shown = b""
    while True:
        try:
            data = os.read(main, 65536)
        except OSError:  # the other side is closed
            break
        if not data:
            break
        shown += data
    os.close(main)
    assert process.wait(60) == 0, shown
    return shown.decode()


def test_a_terminal_shows_the_phase_in_one_line_that_goes_again():
    shown = in_a_terminal(PROGRAM)
    for text in ("opensmp: tracing [bold]model[/bold] 'x'", "opensmp: planning"):
        assert text in shown
    assert "compiling 12 of 12" in shown
    assert "0:00:01" in shown
    assert "from the model, long long" in shown
    assert "opensmp info: planned " + ("word " * 40).strip() in shown  # not wrapped
    assert "without a line break" in shown
    last = shown.rsplit("compiling 12 of 12", 1)[1]
    assert "\x1b[2K" in last  # erased
    assert shown.rstrip().endswith("after")


def test_what_goes_to_a_file_stays_out_of_the_terminal(tmp_path):
    with open(tmp_path / "out.txt", "wb") as file:
        shown = in_a_terminal(PROGRAM, file.fileno())
    written = (tmp_path / "out.txt").read_text()
    assert written == "from the model, " + "long " * 40 + "\nwithout a line break\nafter\n"
    assert "opensmp: planning" in shown
    assert "from the model" not in shown


@pytest.mark.parametrize("environment", [{"OPENSMP_LOG": "warning"}, {"TERM": "dumb"}])
def test_a_quiet_program_and_a_terminal_without_cursor_have_no_status_line(environment):
    shown = in_a_terminal(PROGRAM, **environment)
    assert "\x1b" not in shown
    assert "planning" not in shown
