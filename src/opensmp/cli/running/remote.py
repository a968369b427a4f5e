"""What `opensmp run --hosts` starts on each machine; see `over_ssh`."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

import typer

from opensmp.cli.run import run_here
from opensmp.cli.running.node import Node
from opensmp.cli.running.run_options import RunOptions
from opensmp.errors import SmpError


def main() -> int:
    """Runs the ranks that the first line of the standard input orders."""
    line = b""
    while not line.endswith(b"\n"):
        data = os.read(0, 1)  # what follows the line is the end of the input
        if not data:
            return 128 + signal.SIGTERM
        line += data
    orders = json.loads(line)
    os.environ.update(orders["environ"])
    options = orders["options"]
    if options["log_dir"] is not None:
        options["log_dir"] = Path(options["log_dir"])
    threading.Thread(target=_end_with_input, daemon=True).start()
    try:
        run_here(RunOptions(**options), Node(**orders["node"]), orders["restart"])
    except typer.Exit as end:
        return end.exit_code
    except SmpError as error:
        print(f"opensmp: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _end_with_input() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
