"""Runs the tests; up to three that fail are run once more, alone.

    python scripts/tests_twice.py out/failed_once.txt bash scripts/test.sh -m "not slow"

A machine that has much else to do may fail a test that waits for something. It is not passed in
silence: the file gets the names of the tests that failed once and passed alone. A test that fails
twice fails the run, and so do more than three failed tests, and anything else that goes wrong.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

MOST = 3
"""So many failed tests are run once more."""

VARIABLE = "TESTS_FAILURES"
"""Environment variable that names the file in which tests/failures.py writes what failed."""

_SOME_FAILED = 1  # pytest's exit code; others are of errors that are no test's


def run_twice(command: Sequence[str], passed_alone: Path) -> int:
    """Runs the tests, and those that failed once more.

    Args:
        command: Runs pytest, and passes on the arguments that are added to it.
        passed_alone: Gets the ids of the tests that failed first and then passed, one in a line.

    Returns:
        pytest's exit code.
    """
    passed_alone.parent.mkdir(parents=True, exist_ok=True)
    passed_alone.write_text("", encoding="utf-8")
    environ = {name: value for name, value in os.environ.items() if name != VARIABLE}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "failures.txt"
        code = subprocess.run(command, env=environ | {VARIABLE: str(file)}, check=False)
        if code.returncode != _SOME_FAILED or not file.exists():
            return code.returncode
        failed = file.read_text(encoding="utf-8").splitlines()
    if not 0 < len(failed) <= MOST:
        return code.returncode
    print(f"\n==> once more, alone: {len(failed)} that failed", flush=True)
    again = subprocess.run([*command, "-n", "0", *failed], env=environ, check=False)
    if again.returncode == 0:
        passed_alone.write_text("".join(f"{each}\n" for each in failed), encoding="utf-8")
    return again.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("passed_alone", type=Path, help="file for what failed and passed alone")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what runs pytest")
    arguments = parser.parse_args()
    raise SystemExit(run_twice(arguments.command, arguments.passed_alone))


if __name__ == "__main__":
    main()
