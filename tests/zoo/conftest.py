"""Says at the end of a run which part of the zoo it took."""

from __future__ import annotations

from typing import Any

from zoo.rotation import ROTATION, VARIABLE, rotating


def pytest_terminal_summary(terminalreporter: Any) -> None:
    ran = terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", [])
    if any("test_rotating_part" in report.nodeid for report in ran):
        names = ", ".join(entry.name for entry in rotating(ROTATION))
        terminalreporter.write_line(f"zoo: {names}; these again with {VARIABLE}={ROTATION}")
