"""The tables of a page: partitions, and other settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opensmp.base.message_text import counted
from opensmp.cli.reporting.charts import bar
from opensmp.cli.reporting.findings import Findings, whole
from opensmp.cli.reporting.markup import escaped, or_dash, percent, row_name
from opensmp.cli.reporting.measured_step import Row
from opensmp.cli.reporting.run_folder import Memory
from opensmp.compiler.format import format_bytes, format_seconds


def memory_of(found: Findings) -> list[Memory]:
    """The peaks of all ranks."""
    rows = [m for rank in found.run.ranks.values() for m in rank.memory]
    return sorted(rows, key=lambda m: (m.rank, m.partition))


def partitions_table(found: Findings) -> str:
    """What was predicted and measured of each partition."""
    step, plan = found.step, found.plan
    memory = {(m.rank, m.partition): m for m in memory_of(found)}
    ranks = [
        (rank, each.replica, partition)
        for rank, each in found.run.ranks.items()
        for partition in _owned(each.head)
    ]
    ranks.sort(key=lambda each: (each[1], each[2]))
    if not ranks:
        return ""
    microbatches = max(1, whole(found.run.first.head["config"].get("microbatches")))
    several = len({replica for _, replica, _ in ranks}) > 1
    largest = max((m.peak_bytes for m in memory.values()), default=0)
    rows = []
    for rank, replica, partition in ranks:
        row = Row(replica, partition)
        cells = [row_name(row, several), str(rank)]
        planned = None
        if plan is not None and plan.has_costs and partition < plan.num_partitions:
            planned = plan.rows[partition]
        for forward in (True, False):
            seconds = None
            if planned is not None:
                seconds = planned.forward_seconds if forward else planned.backward_seconds
            cells.append(or_dash(seconds, format_seconds))
            cells.append(
                "-"
                if step is None or row not in step.rows
                else format_seconds(
                    sum(
                        event.seconds
                        for event in step.events
                        if event.row == row and (event.action.kind == "F") is forward
                    )
                    / microbatches
                )
            )
        busy = "-"
        if step is not None and row in step.rows and step.makespan_seconds:
            share = step.busy_seconds(row) / step.makespan_seconds
            busy = f"{percent(share)}{bar(share, 1.0)}"
        handed = None if found.handover is None else found.handover.get(row)
        known = memory.get((rank, partition))
        cells = [escaped(cell) for cell in cells]
        cells.append(busy)
        cells.append(escaped(or_dash(planned and planned.transfer_seconds, format_seconds)))
        per = None if handed is None else handed / microbatches
        cells.append(escaped(or_dash(per, format_seconds)))
        cells.append(escaped(or_dash(known and known.predicted_bytes, format_bytes)))
        cells.append(_peak(known, largest))
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    heads = (
        "replica / partition" if several else "partition",
        "rank",
        "forward, predicted",
        "measured",
        "backward, predicted",
        "measured",
        "busy",
        "transfers, predicted",
        "hand-over, measured",
        "memory, predicted",
        "peak, measured",
    )
    titles = "".join(f"<th>{each.replace(', ', ',<br>')}</th>" for each in heads)
    notes = ["Times are for one microbatch."]
    if found.handover is not None:
        notes.append(
            "Hand-over is the time in which a partition was idle although what it waited for was "
            "computed: transfers, and starting."
        )
    if any(m.measured_by == "resident" for m in memory.values()):
        notes.append(
            "The peak of CPU devices is the resident memory of the whole process, with Python, "
            "TensorFlow and the graphs, which are not predicted; in brackets, what was there "
            "before the model."
        )
    return (
        f'<h2>Partitions</h2>\n<div class="wide"><table class="partitions"><thead><tr>{titles}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
        f'<p class="faint">{escaped(" ".join(notes))}</p>'
    )


def _owned(head: Mapping[str, Any]) -> list[int]:
    given = head.get("partitions")
    return [p for p in given if type(p) is int] if isinstance(given, list) else []


def _peak(known: Memory | None, largest: int) -> str:
    if known is None:
        return "-"
    if known.shares and known.partition != known.shares[0]:
        return f"with {known.shares[0]}"
    before = f" ({format_bytes(known.before_bytes)})" if known.before_bytes else ""
    return f"{format_bytes(known.peak_bytes)}{before}{bar(known.peak_bytes, largest)}"


def alternatives_table(found: Findings) -> str:
    """Simulations with other settings."""
    if not found.alternatives:
        return ""
    now = found.alternatives[0]
    rows = []
    for each in found.alternatives:
        what = ", ".join(
            counted(value, "microbatch") if isinstance(value, int) else f"pipeline {value!r}"
            for value in each.settings.values()
        )
        change = each.seconds_per_microbatch / now.seconds_per_microbatch - 1
        cells = (
            what or "as it ran",
            percent(each.step.bubble),
            format_seconds(each.step.seconds),
            "" if each is now else f"{100 * change:+.0f} %",
            format_bytes(each.step.peak_bytes),
            "yes" if each.step.fits else "NO",
        )
        mark = ' class="now"' if each is now else ""
        rows.append(f"<tr{mark}>{''.join(f'<td>{escaped(cell)}</td>' for cell in cells)}</tr>")
    heads = ("settings", "bubble", "step", "time per microbatch", "fullest partition", "fits")
    titles = "".join(f"<th>{each}</th>" for each in heads)
    source = (
        "median times of the measured step's passes and hand-overs"
        if found.simulated_with == "measured"
        else "plan's times"
    )
    why = found.timed_plan[1]
    note = (
        f"Simulated with the {source}; the update of weights, memory and what a link carries a "
        "second are predicted. "
        "Microbatches have the same size, so that twice as many are a batch twice as large; in a "
        "batch of the same size each has fewer rows, and the bubble is the same if it takes as "
        "much less time."
    )
    if why and found.simulated_with != "measured":
        note += f" Measured times are not used: {why}."
    return (
        f'<h2>Other settings, simulated</h2>\n<div class="wide"><table><thead><tr>{titles}</tr>'
        f'</thead><tbody>{"".join(rows)}</tbody></table></div><p class="faint">{escaped(note)}</p>'
    )
