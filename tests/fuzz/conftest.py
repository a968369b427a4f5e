"""Says at the end what the cases of each fuzz test came to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fuzz.bounds import tallies


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A failing case may be long to print, which hypothesis warns of."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(
                pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")
            )


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
