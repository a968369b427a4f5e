"""How `.ci/run` runs examples, benchmarks and pages: scripts/two_at_a_time.py."""

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

from processes import alive

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "two_at_a_time.py"
spec = importlib.util.spec_from_file_location("two_at_a_time", SCRIPT)
two_at_a_time = importlib.util.module_from_spec(spec)
spec.loader.exec_module(two_at_a_time)


def test_all_run_and_the_output_of_each_is_in_one_piece(capsys):
    commands = [f"echo {i}; sleep 0.05; echo {i}" for i in range(5)]
    assert two_at_a_time.run_all(commands, 60) == 0
    out = capsys.readouterr().out
    assert all(f"\n{i}\n{i}\n--> passed" in out for i in range(5))


def test_nothing_is_started_after_a_failure(tmp_path, capsys):
    mark = tmp_path / "started"
    assert two_at_a_time.run_all(["exit 3", f"touch {mark}"], 60, at_a_time=1) == 3
    assert not mark.exists()
    assert "failed (exit 3)" in capsys.readouterr().out


def test_what_takes_too_long_is_ended_with_its_children(capsys):
    assert two_at_a_time.run_all(["echo before; sleep 100 & sleep 100"], 0.5) == 124
    out = capsys.readouterr().out
    assert "before" in out
    assert "still running after 0.5 s" in out


def test_a_signal_ends_what_runs(tmp_path):
    pid = tmp_path / "pid"
    ran = subprocess.Popen([sys.executable, SCRIPT, f"echo $$ >{pid}; sleep 100 & wait"])
    while not (pid.exists() and pid.read_text()):
        time.sleep(0.05)
    ran.terminate()
    assert ran.wait(30) == 143
    latest = time.monotonic() + 30
    while alive(int(pid.read_text())) and time.monotonic() < latest:
        time.sleep(0.05)
    assert not alive(int(pid.read_text()))
