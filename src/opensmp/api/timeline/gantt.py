"""Draws a measured step as a text Gantt chart: one row per device, time along the columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opensmp.api.timeline.timeline import Event, StepTimeline


def gantt(step: StepTimeline, num_columns: int = 88) -> str:
    """Draws the actions of a step to scale.

    An action is drawn as `F0---` (kind and microbatch, padded to its duration), prefixed with
    the segment if a device has more than one: `2F0`. Dots are idle time. Names of actions that
    are too short are truncated.

    Args:
        step: The step.
        num_columns: Columns for the makespan, >= 1.

    Returns:
        The rows, an axis and a legend, without a newline at the end.

    Example:
        ```text
        CPU:0 |F0--F1--F2--F3--..B0------B1------B2------B3------
        CPU:1 |....F0--B0------F1--B1------F2--B2-------F3--B3-----
        ```
    """
    several = any(
        len({e.action.segment for e in step.events if e.partition == p}) > 1
        for p in range(len(step.devices))
    )
    names = [device.removeprefix("/device:") for device in step.devices]
    margin = max(map(len, names), default=0)
    rows = []
    for partition, name in enumerate(names):
        if not name:  # the partition runs in another process
            continue
        row = ["."] * num_columns
        for event in step.events:
            if event.partition == partition:
                _draw(row, event, step, several)
        rows.append(f"{name:<{margin}} |{''.join(row)}|")
    end = f"{1e3 * step.makespan_seconds:.1f} ms"
    rows.append(f"{'':<{margin}}  0{end:>{max(num_columns - 1, len(end) + 1)}}")
    busy = ", ".join(f"{1e2 * f:.0f} %" for f in step.busy_fraction.values())
    rows.append(
        f"{step.name} {step.index}: {end}, busy {busy}, "
        f"overlap {1e2 * step.overlap:.0f} %, bubble {1e2 * step.bubble:.0f} %"
    )
    return "\n".join(rows)


def _draw(row: list[str], event: Event, step: StepTimeline, several: bool) -> None:
    scale = len(row) / step.makespan_seconds if step.makespan_seconds else 0.0
    first = int((event.start_seconds - step.start_seconds) * scale)
    last = int((event.end_seconds - step.start_seconds) * scale)
    first = min(first, len(row) - 1)
    length = max(1, min(last, len(row)) - first)
    text = event.action.text
    if not several:
        text = text.removeprefix(str(event.action.segment))
    row[first : first + length] = text[:length].ljust(length, "-")
