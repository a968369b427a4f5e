"""A plan as a table, for a terminal."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from opensmp.base import notebook
from opensmp.base.message_text import counted
from opensmp.compiler.cluster.machine import assumptions
from opensmp.compiler.format import format_bytes, format_count, format_seconds, shortened
from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.plan.report.partition_stats import PartitionRow
from opensmp.compiler.plan.report.recommendation import Candidate

WIDE = 128
"""Width in columns that the full table may need."""


def plan_table(plan: Plan, compact: bool = False) -> Table:
    """Returns a table of a plan's partitions, if `compact` for a terminal of 80 columns."""
    columns = [column for column in _COLUMNS if not (compact and column.wide)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in columns:
        justify: Literal["left", "right"] = "left" if column.title == "layers" else "right"
        table.add_column(column.title, justify=justify, no_wrap=True)
    for cells in _cells(plan, columns):
        # As Text, since layer names may look like rich markup.
        table.add_row(*map(Text, cells))
    return table


def _cells(plan: Plan, columns: Sequence[_Column]) -> Iterator[list[str]]:
    """Yields the texts of the rows; neighbouring empty partitions share one."""
    for empty, group in itertools.groupby(plan.rows, lambda row: not row.num_operations):
        rows = list(group)
        if empty and len(rows) > 1:
            named = f"(empty: {len(rows)} partitions)"
            texts = {"part": f"{rows[0].partition}-{rows[-1].partition}", "layers": named}
            yield [texts.get(column.title, "-") for column in columns]
            continue
        for row in rows:
            yield [column.cell(row) for column in columns]


class _Column(NamedTuple):
    title: str
    cell: Callable[[PartitionRow], str]
    wide: bool = False


_COLUMNS = (
    _Column("part", lambda row: str(row.partition)),
    _Column("layers", lambda row: shown_layers(row.layers)),
    _Column("oper-\nations", lambda row: str(row.num_operations), wide=True),
    _Column("para-\nmeters", lambda row: format_bytes(row.parameter_bytes)),
    _Column("peak\nmemory", lambda row: format_bytes(row.peak_bytes)),
    _Column("forward\nFLOPs", lambda row: format_count(row.forward_flops), wide=True),
    _Column("forward\ntime", lambda row: format_seconds(row.forward_seconds), wide=True),
    _Column("backward\ntime", lambda row: format_seconds(row.backward_seconds), wide=True),
    _Column("transfer\ntime", lambda row: format_seconds(row.transfer_seconds), wide=True),
    _Column("stage\ntime", lambda row: format_seconds(row.stage_seconds)),
    _Column("sends", lambda row: _sent(row.sends)),
)


def _sent(sends: Mapping[int, int]) -> str:
    return "\n".join(f"{format_bytes(size)} to {to}" for to, size in sends.items()) or "-"


def plan_text(plan: Plan) -> str:
    """Returns heading, table and summary as plain text."""
    assumed = assumptions(plan.settings.machine)
    return f"{heading(plan)}\n{_rendered(plan_table(plan))}\n{summary(plan)}\n{assumed}"


def plan_html(plan: Plan) -> str:
    """Returns heading, table and summary as HTML, for a notebook."""
    titles = [column.title.replace("-\n", "").replace("\n", " ") for column in _COLUMNS]
    shown = notebook.table(titles, _cells(plan, _COLUMNS), left=["layers"])
    below = [summary(plan), assumptions(plan.settings.machine)]
    return notebook.paragraph(heading(plan)) + shown + "".join(map(notebook.paragraph, below))


def heading(plan: Plan) -> str:
    """Returns one line with the model and the settings of a plan."""
    return f"Plan of {plan.model} over {counted(plan.num_partitions, 'partition')}: {plan.settings}"


def summary(plan: Plan) -> str:
    """Returns one line with a plan's predicted step time, memory, balance and bubble."""
    prediction = plan.prediction
    return (
        f"predicted step {format_seconds(prediction.step_seconds)}, peak memory "
        f"{format_bytes(max(prediction.peak_bytes))}, slowest stage {prediction.balance:.2f} x the "
        f"mean, bubble {100 * prediction.bubble:.0f} %, "
        f"{format_bytes(prediction.cut_bytes)} moved per microbatch"
    )


def recommendation_table(
    candidates: Iterable[Candidate], memory_bytes: int | None, compact: bool = False
) -> Table:
    """Returns a table of ranked configurations, if `compact` for a terminal of 80 columns."""
    limit = "no memory limit" if memory_bytes is None else f"{format_bytes(memory_bytes)} a device"
    table = Table(
        title=f"Configurations, the best one first ({limit})",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for name in ("", "parti-\ntions", "micro-\nbatches"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("pipeline", no_wrap=True)
    wide = () if compact else ("balance", "moved")
    for name in ("pieces", "step", "bubble", "peak\nmemory", *wide):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    for rank, candidate in enumerate(candidates, start=1):
        prediction = candidate.prediction
        details = (f"{prediction.balance:.2f}", format_bytes(prediction.cut_bytes))
        table.add_row(
            str(rank),
            str(candidate.num_partitions),
            str(candidate.settings.microbatches),
            candidate.settings.pipeline,
            str(candidate.settings.pieces_per_partition),
            format_seconds(candidate.step_seconds),
            f"{100 * candidate.bubble:.0f} %",
            format_bytes(candidate.peak_bytes),
            *(details if wide else ()),
            "yes" if candidate.fits else "no",
        )
    return table


def shown_layers(layers: Iterable[str]) -> str:
    """Abbreviates layer names to two lines: the first, the last, and their number."""
    names = [shortened(name, 24) for name in layers]
    if not names:
        return "(empty)"
    if len(names) <= 2:
        return "\n".join(names)
    return f"{names[0]}\n… {names[-1]} ({len(names)})"


def _rendered(table: Table) -> str:
    # Without the last two arguments, rich would look where it runs, and hand the table to a
    # notebook instead of the file.
    console = Console(
        file=io.StringIO(),
        width=WIDE,
        color_system=None,
        force_jupyter=False,
        force_terminal=False,
    )
    console.print(table)
    file = console.file
    assert isinstance(file, io.StringIO)
    return "\n".join(line.rstrip() for line in file.getvalue().strip("\n").splitlines())
