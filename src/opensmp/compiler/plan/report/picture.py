"""Draws a plan: layers by partition, cut tensors, costs, and the predicted schedule."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path

from opensmp.base.message_text import counted
from opensmp.compiler.format import format_bytes, format_seconds, shortened
from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.plan.report.explanation import passing
from opensmp.compiler.plan.report.picture_nodes import Band, LayerGraph, condense
from opensmp.compiler.plan.report.predicted_schedule import PredictedSchedule, predict_schedule

# Okabe and Ito, "Color Universal Design" (2008): distinguishable with all kinds of colour vision.
# Partitions beyond the palette repeat it; each is numbered wherever it is shown.
_PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
_INK, _FAINT = "#222222", "#999999"
_SMALL, _NORMAL = 7.5, 9.0
_TINY, _LEAST = 6.5, 4.5  # what is smaller cannot be read, and is left out
_POINTS = 72  # per inch
_MOST_NAMED = 2
_MOST_BANDS = 10  # with names of tensors and the word "partition"
_LABELLED_ROWS = 32
_MOST_ROWS = 64  # with the value beside each bar

Axes = Any


class PlanFigure(Figure):
    """A figure that notebooks display without any matplotlib setup."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()


def draw_plan(
    plan: Plan, path: str | os.PathLike[str] | None = None, *, schedule: bool = True
) -> Figure:
    """Draws a plan, with or without its predicted schedule.

    From top to bottom: the layers as bars of their time, in the band of their partition, with arcs
    for tensors between layers and labels for the tensors that cross each cut; the time and the
    memory of each partition; the predicted schedule.
    """
    layers = condense(plan)
    rows = plan.num_partitions
    width = min(max(13.0, 0.5 * len(layers.bands)), 20.0)
    heights = [3.0, _height(rows, 0.17, 2.0)]
    if schedule:
        heights.append(_height(rows, 0.33 if rows <= 16 else 0.2, 1.0))
    engine = ConstrainedLayoutEngine(hspace=0.05, h_pad=0.1)
    figure = PlanFigure(figsize=(width, sum(heights) + 3.3), layout=engine)
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    figure.suptitle(_title(plan), fontsize=11, color=_INK, x=0.01, ha="left")
    _draw_layers(figure.add_subplot(grid[0, :]), plan, layers)
    _draw_times(figure.add_subplot(grid[1, 0]), plan)
    _draw_memory(figure.add_subplot(grid[1, 1]), plan)
    if schedule:
        _draw_schedule(figure.add_subplot(grid[2, :]), plan, predict_schedule(plan))
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _height(rows: int, each: float, least: float) -> float:
    """Inches of a plot with a row for each partition; rows without labels may be thin."""
    return max(least, each * min(rows, _MOST_ROWS) + 0.5)


def row_labels(axes: Axes, num_rows: int) -> None:
    """Numbers the rows, of many only some."""
    every = -(-num_rows // _LABELLED_ROWS)
    axes.set_yticks(range(0, num_rows, every))


def time_unit(seconds: float) -> tuple[float, str]:
    """Returns the factor and the name of the unit in which to show a duration."""
    return (1.0, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "µs")


def colour(partition: int) -> str:
    """Returns the colour of a partition."""
    return _PALETTE[partition % len(_PALETTE)]


def tint(partition: int, share: float) -> tuple[float, float, float]:
    """Returns the colour of a partition mixed with white; `share` is the part of the colour."""
    return _mixed(colour(partition), share)


def _mixed(hue: str, share: float) -> tuple[float, float, float]:
    red, green, blue = (share * c + 1 - share for c in to_rgb(hue))
    return red, green, blue


def _title(plan: Plan) -> str:
    prediction = plan.prediction
    return (
        f"{plan.model} over {counted(plan.num_partitions, 'partition')} · {plan.settings}\n"
        f"peak memory {format_bytes(max(prediction.peak_bytes))} · slowest stage "
        f"{prediction.balance:.2f} x the mean"
    )


def plain(axes: Axes, title: str) -> None:
    """Gives a plot its title, small ticks and no frame."""
    axes.set_title(title, fontsize=_NORMAL, color=_INK, loc="left", fontweight="bold")
    axes.tick_params(labelsize=_SMALL, colors=_INK, length=2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


# --- the layers --------------------------------------------------------------------------------


def _draw_layers(axes: Axes, plan: Plan, layers: LayerGraph) -> None:
    """Draws bands of width one, with bars below the base line and arcs above it."""
    place = _places(layers)
    longest = max((node.seconds for node in layers.nodes), default=0.0) or 1.0
    room = _room(axes, layers)
    for index, band in enumerate(layers.bands):
        axes.axvspan(index, index + 1, color=tint(band.partition, 0.18), lw=0, zorder=0)
        if room >= _NORMAL:
            stage = _band_text(band, len(layers.bands))
            axes.text(index + 0.5, 1.62, stage, ha="center", va="top", fontsize=_NORMAL, color=_INK)
        width = 0.62 * _spacing(band)
        for node in band.nodes:
            height = 0.8 * layers.nodes[node].seconds / longest
            axes.bar(place[node], -height, width, color=colour(band.partition), zorder=3)
    axes.axhline(0, color=_INK, lw=0.8, zorder=4)
    _draw_arcs(axes, layers, place)
    _draw_cuts(axes, plan, layers)
    axes.set_xlim(0, len(layers.bands))
    axes.set_ylim(-0.9, 1.66)
    axes.set_yticks([-0.8, 0], [format_seconds(longest), "0"])
    title = "Layers: time of one microbatch (bars), what is read from where (arcs)"
    if len(layers.bands) > _MOST_BANDS:
        title += "; numbers at the top are partitions" * (room >= _NORMAL)
    plain(axes, title)
    names = [(place[i], node.name) for i, node in enumerate(layers.nodes)]
    spacing = min((b - a for (a, _), (b, _) in pairwise(sorted(names))), default=1.0)
    size = min(_SMALL, 0.8 * room * spacing)
    if size >= _LEAST:
        axes.set_xticks([x for x, _ in names], [name for _, name in names], rotation=90)
        axes.tick_params(axis="x", labelsize=size)
    else:
        axes.set_xticks([])


def _room(axes: Axes, layers: LayerGraph) -> float:
    """Points that a band is wide."""
    return float(0.9 * _POINTS * axes.figure.get_figwidth() / max(1, len(layers.bands)))


def _band_text(band: Band, num_bands: int) -> str:
    if num_bands > _MOST_BANDS:
        return str(band.partition)
    return f"partition {band.partition}" + ": empty" * (not band.nodes)


def _places(layers: LayerGraph) -> dict[int, float]:
    return {
        node: index + 0.5 + (position - (len(band.nodes) - 1) / 2) * _spacing(band)
        for index, band in enumerate(layers.bands)
        for position, node in enumerate(band.nodes)
    }


def _spacing(band: Band) -> float:
    return 1.0 / max(len(band.nodes), 3)


def _draw_arcs(axes: Axes, layers: LayerGraph, place: dict[int, float]) -> None:
    """Draws one arc per edge, with its height by distance and its width by bytes."""
    largest = max((edge.forward_bytes for edge in layers.edges), default=0) or 1
    reach = max((place[e.target] - place[e.source] for e in layers.edges), default=0.0) or 1.0
    for edge in layers.edges:
        left, right = place[edge.source], place[edge.target]
        # The apex of a cubic Bezier curve is at three quarters of its control points.
        height = (0.2 + 0.5 * (right - left) / reach) / 0.75
        path = Path(
            [(left, 0), (left, height), (right, height), (right, 0)],
            [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4],
        )
        axes.add_patch(
            PathPatch(
                path,
                fill=False,
                lw=0.6 + 2.0 * edge.forward_bytes / largest,
                color=_INK if edge.cut else _FAINT,
                zorder=2 if edge.cut else 1,
            )
        )


def _draw_cuts(axes: Axes, plan: Plan, layers: LayerGraph) -> None:
    """Labels each border with the tensors that cross it."""
    bands = layers.bands
    many = len(bands) > _MOST_BANDS
    show = not many or _room(axes, layers) >= 2 * _TINY
    one_each = [band.partition for band in bands] == list(range(plan.num_partitions))
    for index in range(1, len(bands)):
        axes.axvline(index, color="white", lw=2, zorder=1)
        text = _passing_text(plan, index - 1) if one_each else _arcs_text(layers, index)
        if text and show:
            axes.text(
                index,
                1.42,
                text,
                ha="center",
                va="top",
                rotation=90 if many else 0,
                fontsize=_TINY,
                color=_INK,
                zorder=6,
                bbox={"boxstyle": "round,pad=0.25", "fc": "white", "ec": _FAINT, "lw": 0.5},
            )


def _passing_text(plan: Plan, before: int) -> str:
    """Lists the largest tensors that cross the border after a partition, with their sizes."""
    tensors = passing(plan.costs, plan.assignment, before)
    if not tensors:
        return ""
    total = format_bytes(sum(tensor.forward_bytes for tensor in tensors))
    if plan.num_partitions > _MOST_BANDS:
        return total
    lines = [f"{total} in {len(tensors)}"] if len(tensors) > 1 else []
    room = 26 if plan.num_partitions <= 6 else 18
    for tensor in tensors[:_MOST_NAMED]:
        lines.append(shortened(plan.costs.names[tensor.producer], room))
        lines.append(format_bytes(tensor.forward_bytes))
    return "\n".join(lines)


def _arcs_text(layers: LayerGraph, index: int) -> str:
    """Returns the total bytes of cut arcs across a border, for partitions with several bands."""
    left = {node for band in layers.bands[:index] for node in band.nodes}
    total = sum(
        edge.forward_bytes
        for edge in layers.edges
        if edge.cut and edge.source in left and edge.target not in left
    )
    return format_bytes(total) if total else ""


# --- costs -------------------------------------------------------------------------------------


def _draw_times(axes: Axes, plan: Plan) -> None:
    parts = [
        ("forward", 0.45, "", [row.forward_seconds for row in plan.rows]),
        ("backward", 1.0, "", [row.backward_seconds for row in plan.rows]),
        ("transfer", 0.12, "////", [row.transfer_seconds for row in plan.rows]),
    ]
    _stacked(axes, parts, format_seconds)
    plain(axes, "Time of one microbatch")


def _draw_memory(axes: Axes, plan: Plan) -> None:
    parts = [
        ("parameters", 1.0, "", [row.parameter_bytes for row in plan.rows]),
        ("gradients, optimizer", 0.45, "", [row.state_bytes for row in plan.rows]),
        ("activations", 0.12, "////", [row.activation_bytes for row in plan.rows]),
    ]
    cap = plan.settings.machine.memory_bytes
    _stacked(axes, parts, format_bytes, cap)
    plain(axes, "Memory at its peak")


def _stacked(
    axes: Axes,
    parts: Sequence[tuple[str, float, str, Sequence[float]]],
    shown: Any,
    limit: float | None = None,
) -> None:
    """Draws one stacked bar per partition; `parts` are (name, tint, hatch, values)."""
    rows = range(len(parts[0][3]))
    base = [0.0 for _ in rows]
    for _, share, hatch, values in parts:
        for row, value in zip(rows, values, strict=True):
            axes.barh(
                row,
                value,
                0.7,
                base[row],
                color=tint(row, share),
                hatch=hatch,
                edgecolor=colour(row),
                lw=0.6,
            )
            base[row] += value
    longest = max(base) or 1.0
    for row in rows if len(rows) <= _MOST_ROWS else ():
        axes.text(base[row] + 0.01 * longest, row, shown(base[row]), va="center", fontsize=_SMALL)
    if limit is not None and limit <= 3 * longest:
        axes.axvline(limit, color=_INK, lw=1, ls="--")
        axes.text(limit, -0.7, f"limit {shown(limit)} ", ha="right", va="center", fontsize=_SMALL)
        longest = max(longest, limit)
    axes.set_xlim(0, 1.14 * longest)
    axes.set_ylim(len(rows) - 0.4, -0.9 - 0.02 * len(rows))
    row_labels(axes, len(rows))
    axes.set_ylabel("partition", fontsize=_SMALL)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    grey = "#666666"
    axes.legend(
        handles=[
            Patch(
                facecolor=_mixed(grey, share),
                edgecolor=grey,
                hatch=hatch,
                label=name,
            )
            for name, share, hatch, _ in parts
        ],
        fontsize=_SMALL,
        frameon=False,
        ncols=3,
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        borderaxespad=0.1,
        handlelength=1.4,
    )


# --- schedule ------------------------------------------------------------------------------------


class Bar(NamedTuple):
    """One action in a picture: its partition, start and end, and what is written on it."""

    partition: int
    start: float
    end: float
    is_forward: bool
    text: str


def draw_bars(axes: Axes, bars: Sequence[Bar], num_partitions: int, makespan: float) -> None:
    """Draws actions over time, one row per partition, with texts where there is room."""
    inches = axes.figure.get_figwidth() * 0.92
    spans: dict[tuple[int, bool], list[tuple[float, float]]] = {}
    for bar in bars:
        length = bar.end - bar.start
        spans.setdefault((bar.partition, bar.is_forward), []).append((bar.start, length))
        room = length / makespan * inches * 72 / (0.62 * _SMALL)
        if len(bar.text) + 0.6 <= room:
            ink = _INK if bar.is_forward or _is_light(bar.partition) else "white"
            at = ((bar.start + bar.end) / 2, bar.partition)
            axes.text(*at, bar.text, ha="center", va="center", fontsize=_SMALL, color=ink)
    for (partition, is_forward), found in spans.items():
        hue = tint(partition, 0.45 if is_forward else 1.0)
        axes.broken_barh(found, (partition - 0.41, 0.82), color=hue, edgecolor="white", lw=0.4)
    rows = range(num_partitions)
    axes.set_xlim(0, makespan)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    row_labels(axes, len(rows))
    axes.set_ylabel("partition", fontsize=_SMALL)


def _draw_schedule(axes: Axes, plan: Plan, times: PredictedSchedule) -> None:
    """Draws the simulated schedule, one row per partition."""
    simulation = times.simulation
    makespan = simulation.makespan_seconds or 1.0
    scale, unit = time_unit(makespan)
    stages_of: dict[int, set[int]] = {}
    for action, device in times.graph.device.items():
        stages_of.setdefault(device, set()).add(action.segment)
    some_come_back = any(len(stages) > 1 for stages in stages_of.values())
    bars = [
        Bar(
            device,
            simulation.start[action] * scale,
            simulation.end[action] * scale,
            action.kind == "F",
            action.text if len(stages_of[device]) > 1 else str(action.microbatch),
        )
        for action, device in times.graph.device.items()
    ]
    draw_bars(axes, bars, plan.num_partitions, makespan * scale)
    axes.set_xlabel(unit, fontsize=_SMALL)
    plain(
        axes,
        f"Simulated schedule '{times.schedule.name}': {format_seconds(makespan)}, bubble "
        f"{100 * simulation.bubble:.0f} % (pale: forward, full: backward, white: bubble; numbers "
        f"are microbatches{', 2F0 is forward of stage 2, microbatch 0' * some_come_back})",
    )


def _is_light(partition: int) -> bool:
    red, green, blue = to_rgb(colour(partition))
    return 0.299 * red + 0.587 * green + 0.114 * blue > 0.55
