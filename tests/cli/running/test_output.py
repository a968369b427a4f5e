from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from processes import environ_of_tests, launch

BAR = """
import os, sys, time
print("Epoch 1")
print()
for i in range(9):
    sys.stdout.write(f"\\r{i + 1}/9 " + "=" * i)
    sys.stdout.flush()
print()
print("terminal", sys.stdout.isatty(), sys.stderr.isatty(), end="")
"""


def shown_in_a_terminal(script: Path, *flags: str, columns: int = 80, resized: int = 0) -> bytes:
    """The bytes that a terminal gets from `opensmp run`."""
    main, side = pty.openpty()
    fcntl.ioctl(main, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    command = [sys.executable, "-m", "opensmp", "run", *flags, str(script)]
    environment = {k: v for k, v in environ_of_tests().items() if k not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(command, env=environment, stdin=side, stdout=side, stderr=side)
    os.close(side)
    found = b""
    end = time.monotonic() + 240
    while time.monotonic() < end:
        if not select.select([main], [], [], 1)[0]:
            continue
        try:
            data = os.read(main, 65536)
        except OSError:  # all have closed it
            break
        found += data
        if resized and b"go" in found:
            fcntl.ioctl(main, termios.TIOCSWINSZ, struct.pack("HHHH", 30, resized, 0, 0))
            process.send_signal(28)  # SIGWINCH: this terminal controls no processes
            resized = 0
    os.close(main)
    assert process.wait(60) == 0, found
    return found


@pytest.fixture
def script(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "script.py"
        path.write_text(text)
        return path

    return write


def test_a_single_rank_is_shown_as_it_is():
    result = launch(BAR, ["-n", "1"])
    bars = "".join(f"\r{i + 1}/9 " + "=" * i for i in range(9))
    # Text streams of Python end lines for carriage returns as well.
    expected = f"Epoch 1\n\n{bars}\nterminal False False".replace("\r", "\n")
    assert result.stdout == expected


def test_a_terminal_gets_what_the_rank_would_print_there_itself(script):
    path = script(BAR)
    alone = subprocess.run([sys.executable, str(path)], capture_output=True, check=True).stdout
    found = shown_in_a_terminal(path, "-n", "1", "--idle-seconds", "0")
    shown = found.replace(b"\r\n", b"\n")
    expected = alone.replace(b"terminal False False", b"terminal True True")
    assert shown.startswith(expected), shown
    assert b"[0]" not in found
    assert found.count(b"\n") <= 4


def test_the_rank_that_is_shown_has_the_terminal_and_the_others_have_none(script, tmp_path):
    path = script(
        "import os, sys\n"
        "rank = os.environ['OPENSMP_RUN_RANK']\n"
        f"open(os.path.join({str(tmp_path)!r}, rank), 'w').write(str(sys.stdout.isatty()))\n"
        "print('from', rank)\n"
    )
    found = shown_in_a_terminal(path, "-n", "3", "--show-rank", "1")
    assert b"from 1\r\n" in found
    assert b"from 0" not in found
    assert [(tmp_path / name).read_text() for name in "012"] == ["False", "True", "False"]


def test_the_size_of_the_terminal_is_that_of_the_outer_one_and_follows_it(script):
    path = script(
        "import shutil, sys, time\n"
        "first = shutil.get_terminal_size((1, 1)).columns\n"
        "print('go', flush=True)\n"
        "end = time.monotonic() + 60\n"
        "while shutil.get_terminal_size((1, 1)).columns == first and time.monotonic() < end:\n"
        "    time.sleep(0.02)\n"
        "print(first, shutil.get_terminal_size((1, 1)).columns)\n"
    )
    assert b"97 64" in shown_in_a_terminal(path, "-n", "1", columns=97, resized=64)


def test_part_of_a_line_is_shown_at_once(script):
    path = script("print('half', end='', flush=True)\nimport time\ntime.sleep(600)\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "opensmp", "run", "-n", "2", str(path)],
        env=environ_of_tests(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.read(4) == b"half"
    process.terminate()
    out, err = process.communicate(timeout=120)
    assert out == b""
    # What the launcher says begins a line of its own.
    assert b"\nopensmp run: forwarding SIGTERM" in err


def test_lines_of_several_ranks_have_their_number_and_blank_lines_stay():
    result = launch("print('a')\nprint()\nprint('  b ', end='')\n", ["-n", "2", "-a"])
    for number in "01":
        own = [line for line in result.stdout.splitlines() if line.startswith(f"[{number}]")]
        assert own == [f"[{number}] a", f"[{number}]", f"[{number}]   b "]


def test_log_files_have_the_bytes_of_each_rank(tmp_path):
    launch(BAR, ["-n", "2", "--log-dir", tmp_path])
    for number in (0, 1):
        written = (tmp_path / f"rank-{number}.log").read_bytes()
        assert written.startswith(b"Epoch 1\n\n\r1/9 \r2/9 =")
