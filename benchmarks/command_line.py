"""Processor time until the command line answers: help, versions, and a refused option.

    python benchmarks/command_line.py           # five times each
    python benchmarks/command_line.py --quick   # once each

None of these needs TensorFlow, whose import alone takes some seconds: it stands beside as the last
row. The exit code is 1 if a command takes more than a fifth of that.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence

COMMANDS = {
    "opensmp --help": ["-m", "opensmp", "--help"],
    "opensmp plan --help": ["-m", "opensmp", "plan", "--help"],
    "opensmp run --help": ["-m", "opensmp", "run", "--help"],
    "opensmp --version": ["-m", "opensmp", "--version"],
    "opensmp run with a plan that is missing": [
        "-m",
        "opensmp",
        "run",
        "--plan",
        "no.json",
        "a.py",
    ],
}
IMPORTS = {"import opensmp": ["-c", "import opensmp"]}
TENSORFLOW = "import tensorflow"
SHARE = 0.2


def seconds(arguments: Sequence[str]) -> float:
    """Processor seconds of one run of Python."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, *arguments],
            env=environment,
            cwd=folder,
            capture_output=True,
            timeout=120,
            check=False,
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="once each")
    rounds = 1 if parser.parse_args().quick else 5
    rows = {**COMMANDS, **IMPORTS, TENSORFLOW: ["-c", TENSORFLOW]}
    for arguments in rows.values():  # compiled files are written the first time
        seconds(arguments)
    taken = {
        name: statistics.median(seconds(arguments) for _ in range(rounds))
        for name, arguments in rows.items()
    }
    print("| command | processor seconds | of the import of TensorFlow |")
    print("| --- | --- | --- |")
    for name, value in taken.items():
        print(f"| `{name}` | {value:.2f} | {value / taken[TENSORFLOW]:.0%} |")
    slow = [name for name in COMMANDS if taken[name] > SHARE * taken[TENSORFLOW]]
    if slow:
        print(f"more than {SHARE:.0%} of the import of TensorFlow: {', '.join(slow)}")
    return bool(slow)


if __name__ == "__main__":
    sys.exit(main())
