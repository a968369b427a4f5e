"""Programs killed while they save: the newest readable checkpoint is always a complete one."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest
from processes import environ_of_tests
from turns import day, turn

SCRIPT = str(pathlib.Path(__file__).with_name("kills.py"))
CHANGES = 23  # changes of the file system that one save makes, or a few less


def check(folder, programs, seed=None):
    seed = day() if seed is None else seed
    done = subprocess.run(
        [sys.executable, SCRIPT, folder, str(seed), *programs],
        env=environ_of_tests(),
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, f"seed {seed}\n{done.stdout}\n{done.stderr}"
    assert done.stdout.count("program ") == len(programs) + 1
    return done.stdout


@turn(0, of=3)
def test_kills_at_random_moments_and_before_each_change_of_files_lose_nothing(tmp_path):
    programs = ["count sync"] * 3  # the third one is the first that removes an old checkpoint
    programs += [f"{number} sync" for number in range(1, CHANGES + 1)]
    programs += ["random sync", "random background"] * 3
    output = check(tmp_path, programs)
    counted = [int(text.split()[0]) for text in output.split("CHANGES ")[1:]]
    assert max(counted) <= CHANGES


@turn(1, of=3)
def test_kills_while_a_checkpoint_takes_the_place_of_another_lose_nothing(tmp_path):
    programs = ["count fixed", *(f"{number} fixed" for number in range(1, CHANGES + 1))]
    check(tmp_path, programs)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sync", "background", "fixed"])
def test_fifty_kills_at_random_moments_lose_nothing(tmp_path, how):
    check(tmp_path, [f"random {how}"] * 50, seed=7)
