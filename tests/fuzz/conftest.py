"""Says at the end what the cases of each fuzz test came to."""

from __future__ import annotations

from typing import Any

from fuzz.bounds import tallies


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not tallies:  # also where the tests run in other processes
        return
    terminalreporter.section("fuzz: cases that were taken and refused")
    row = "{:>9} {:>9} {:>9} {:>9} {:>9}  {}"
    terminalreporter.write_line(
        row.format("taken", "refused", "all s", "most s", "most MiB", "test")
    )
    for name, tally in tallies.items():
        terminalreporter.write_line(
            row.format(
                tally.taken,
                tally.refused,
                f"{tally.seconds:.1f}",
                f"{tally.most_seconds:.2f}",
                tally.most_bytes >> 20,
                name,
            )
        )
