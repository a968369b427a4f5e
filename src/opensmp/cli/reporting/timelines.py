"""The timelines of a page, which its script draws."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from opensmp.cli.reporting.findings import Findings
from opensmp.cli.reporting.markup import escaped, json_in_html, percent, row_name
from opensmp.compiler.format import format_seconds
from opensmp.compiler.schedule.actions import Action

_KINDS = {"F": "forward", "B": "backward", "W": "weight gradients", "R": "recomputation"}
_DIGITS = 9  # a nanosecond is enough


def measured_timeline(found: Findings) -> str:
    """The measured step, or why there is none."""
    step = found.step
    if step is None:
        return (
            "<h2>Timeline</h2><p>No step was measured: the run was too short, "
            "<code>timeline_steps</code> was 0, or the training step is one of your own that calls "
            "the model outside of smp.step.</p>"
        )
    index = {row: number for number, row in enumerate(step.rows)}
    events = [(index[e.row], e.start, e.end, e.action) for e in step.events]
    several = len({row.replica for row in step.rows}) > 1
    names = [row_name(row, several) for row in step.rows]
    return _timeline(
        f"Measured: step {step.step + 1}, {format_seconds(step.makespan_seconds)}, bubble "
        f"{percent(step.bubble)}",
        "measured",
        names,
        events,
        step.makespan_seconds,
    )


def predicted_timeline(found: Findings) -> str:
    """The step as the plan predicts it; empty if it does not."""
    if found.predicted is None:
        return ""
    graph, simulation = found.predicted
    events = [
        (device, simulation.start[action], simulation.end[action], action)
        for action, device in graph.device.items()
    ]
    seconds = simulation.makespan_seconds
    return _timeline(
        f"Predicted by the plan: {format_seconds(seconds)}, bubble {percent(simulation.bubble)}",
        "predicted",
        [f"partition {number}" for number in range(graph.num_devices)],
        events,
        seconds,
    )


def _timeline(
    title: str,
    name: str,
    rows: Sequence[str],
    events: Iterable[tuple[int, float, float, Action]],
    seconds: float,
) -> str:
    listed = [
        [row, round(start, _DIGITS), round(end, _DIGITS), a.kind, a.segment, a.microbatch]
        for row, start, end, a in sorted(events, key=lambda event: (event[0], event[1]))
    ]
    kinds = [kind for kind in _KINDS if any(event[3] == kind for event in listed)]
    segments = {(event[0], event[4]) for event in listed}
    data = {
        "rows": list(rows),
        "events": listed,
        "seconds": seconds,
        "several": len(segments) > len({row for row, _ in segments}),
    }
    keys = "".join(f'<span><i class="key {k}"></i>{_KINDS[k]}</span>' for k in kinds)
    tools = "".join(
        f'<button type="button" data-action="{action}" title="{label}">{text}</button>'
        for action, text, label in (
            ("in", "Zoom in", "Zoom in (+)"),
            ("out", "Zoom out", "Zoom out (-)"),
            ("all", "Whole step", "The whole step (0)"),
        )
    )
    return (
        f"<h2>{escaped(title)}</h2>\n"
        f'<div class="timeline" id="{name}"><div class="bar-of-tools">{tools}'
        f'<span class="keys faint">{keys}</span></div>'
        f'<svg role="img" tabindex="0" aria-label="{escaped(title)}"></svg>'
        f'<p class="readout faint"></p>'
        "<noscript><p>Timelines are drawn by the script of this page, which is off.</p></noscript>"
        f'<script type="application/json">{json_in_html(data)}</script></div>'
    )
