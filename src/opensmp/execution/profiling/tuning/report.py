"""What was measured, as a table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from opensmp.execution.profiling.tuning.trial import Outcome


def table(outcomes: Sequence[Outcome], best: Outcome) -> Table:
    """All outcomes in the order of their times; the first of `outcomes` is the script's own."""
    own = outcomes[0]
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    made.add_column("settings", overflow="fold")
    for title in ("predicted", "measured", "speed"):
        made.add_column(title, justify="right", no_wrap=True)
    made.add_column("", no_wrap=True)
    for outcome in sorted(outcomes, key=lambda each: each.seconds):
        predicted = outcome.candidate.predicted_seconds
        cells = [
            outcome.changes or "as in the script",
            "-" if predicted is None else _time(predicted),
            "-" if outcome.measured is None else _time(outcome.seconds),
            "-" if outcome.measured is None else f"{own.seconds / outcome.seconds:.2f} x",
            "best" if outcome is best else "" if outcome.measured else _fate(outcome),
        ]
        made.add_row(*map(Text, cells))
    return made


def _fate(outcome: Outcome) -> str:
    return outcome.error.split(":")[0].split(" ")[0].replace("not", "not tried")


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
