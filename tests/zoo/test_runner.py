from __future__ import annotations

import subprocess
from typing import Any

import pytest
from zoo import runner
from zoo.runner import Outcome, check, passed


def _row(partitions: int, dtype: str, relative: float) -> str:
    import json

    differences = {"loss": [0.0, "microbatch 0"], "gradient": [relative, "kernel"]}
    row = {"model": "M", "partitions": partitions, "dtype": dtype, "differences": differences}
    return json.dumps(row)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Stands for the processes: float32 magnifies rounding with 4 partitions."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if "float64" in command:
            return subprocess.CompletedProcess(command, 0, _row(4, "float64", 3e-14), "")
        printed = f"{_row(2, 'float32', 0.0)}\n{_row(4, 'float32', 2e-3)}\n"
        return subprocess.CompletedProcess(command, 0, printed, "")

    monkeypatch.setattr(runner.subprocess, "run", run)
    return commands


def test_what_exceeds_float32_is_compared_again_in_float64(worker: list[list[str]]) -> None:
    outcomes = list(check("M", (2, 4), 1.0))
    assert [str(o) for o in outcomes] == [
        "M, 2 partitions, float32: equal bits",
        "M, 4 partitions, float32: 2.0e-03 (gradient kernel)",
        "M, 4 partitions, float64: 3.0e-14 (gradient kernel)",
    ]
    assert worker[1][-2:] == ["--partitions", "4"]
    assert passed(outcomes, 2)
    assert passed(outcomes, 4)


def test_a_crash_is_named_and_keeps_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    crashed = subprocess.CompletedProcess([], -11, _row(2, "float32", 0.0), "")
    monkeypatch.setattr(runner.subprocess, "run", lambda *_, **__: crashed)
    first, second = check("M", (2, 4), 1.0)
    assert first.passed
    assert second.failure == "the process died of SIGSEGV"
    assert not passed([first, second], 4)


def test_a_process_that_takes_too_long_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, 1.0, output=_row(2, "float32", 0.0).encode())

    monkeypatch.setattr(runner.subprocess, "run", run)
    first, second = check("M", (2, 4), 1.0)
    assert first.passed
    assert second.failure.startswith("not done after")


def test_an_outcome_survives_json() -> None:
    outcome = Outcome("M", 2, "float32", 1e-7, "gradient kernel", details={"parameters": [1, 2]})
    assert Outcome.from_json(outcome.to_json()) == outcome
