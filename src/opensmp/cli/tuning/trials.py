"""Runs a script for a few training steps with given settings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from opensmp.base.message_text import counted
from opensmp.config import TRIAL_VARIABLE
from opensmp.execution.profiling.tuning.trial import (
    WARM_STEPS,
    Candidate,
    Measured,
    Outcome,
    Trial,
)

_ERROR = re.compile(r"[\w.]*(Error|Exception|Interrupt|Exit)\b")
_PREFIX = re.compile(r"^\[\d+\] ")  # of the lines of a rank
_MOST_REASON = 300
_MOST_LINES = 12
_GRACE_SECONDS = 2


class Script(NamedTuple):
    """A script and how it is started."""

    path: str
    arguments: tuple[str, ...] = ()
    processes: int = 1
    module: bool = False

    def command(self) -> list[str]:
        """The command line that runs it."""
        start = [sys.executable, "-m", "opensmp", "run", "-n", str(self.processes)]
        start += ["--grace-seconds", str(_GRACE_SECONDS), *(["-m"] if self.module else [])]
        return [*start, "--", self.path, *self.arguments]


def run_trial(
    script: Script,
    candidate: Candidate,
    changes: Mapping[str, Any],
    steps: int,
    candidates: int,
    seconds: float,
) -> Outcome:
    """Runs the script with these keys in place of its own; it ends itself after `steps` steps."""
    with tempfile.TemporaryDirectory(prefix="opensmp-tune-") as folder:
        result, log = os.path.join(folder, "measured.json"), Path(folder, "output.txt")
        trial = Trial(result, steps, changes, candidates)
        environ = {**os.environ, TRIAL_VARIABLE: trial.to_text()}
        with log.open("wb") as output:
            process = subprocess.Popen(
                script.command(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environ,
            )
            try:
                code = process.wait(timeout=max(seconds, 1.0))
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
        measured = Measured.read(result)
        if measured is not None:
            return Outcome(candidate, measured)
        text = log.read_text(encoding="utf-8", errors="replace")
    return Outcome(candidate, None, _reason(text, code, steps, seconds), _last(text))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a run that is still there, with all its ranks."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=10 * _GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _reason(text: str, code: int | None, steps: int, seconds: float) -> str:
    if code is None:
        return f"stopped after {seconds:.0f} s; give more --seconds"
    if code == 0:
        return (
            f"the script ended before {counted(steps + WARM_STEPS + 1, 'training step')}: {steps} "
            f"that are measured after {WARM_STEPS + 1} to warm up, all by one model's fit or one "
            "smp.step function. If it trains, give fewer --steps, or more data"
        )
    lines = [_PREFIX.sub("", line) for line in text.splitlines() if line.strip()]
    first = max((i for i, line in enumerate(lines) if _ERROR.match(line)), default=len(lines) - 1)
    reason = " ".join(line.strip() for line in lines[max(first, 0) :])
    reason = reason if len(reason) <= _MOST_REASON else f"{reason[:_MOST_REASON]} ..."
    return f"failed with exit code {code}: {reason}"


def _last(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines()[-_MOST_LINES:])
