"""Writes down which tests have failed, for `scripts/tests_twice.py`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

VARIABLE = "TESTS_FAILURES"
"""Environment variable that names the file."""


class Failures:
    """A plugin of pytest that keeps the ids of failed tests in a file, one in a line.

    Args:
        file: Where they are written when the run ends.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._ids: dict[str, None] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._ids[_without_group(report.nodeid)] = None

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._ids[report.nodeid] = None

    def pytest_sessionfinish(self) -> None:
        self._file.write_text("".join(f"{each}\n" for each in self._ids), encoding="utf-8")


def keep_failures(config: pytest.Config) -> None:
    """Writes failures down if an environment variable names a file."""
    file = os.environ.get(VARIABLE)
    if file and not hasattr(config, "workerinput"):  # the processes of pytest-xdist have that
        config.pluginmanager.register(Failures(Path(file)))


def _without_group(test: str) -> str:
    """The id of a test; pytest-xdist adds `@` and the name of its group, which begins as its file.

    Args:
        test: The id as a report has it.
    """
    bare, _, group = test.rpartition(f"@{test.partition('::')[0]}")
    return bare or group
