"""The page of a report: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

from opensmp.base.message_text import counted
from opensmp.cli.reporting.charts import bar, line_chart
from opensmp.cli.reporting.findings import Findings, known_pipeline
from opensmp.cli.reporting.measured_step import Row
from opensmp.cli.reporting.run_folder import Memory
from opensmp.compiler.format import format_bytes, format_count, format_seconds
from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.schedule.actions import Action
from opensmp.config import Config

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_KINDS = {"F": "forward", "B": "backward", "W": "weight gradients", "R": "recomputation"}
_DIGITS = 9  # a nanosecond is enough


def page(found: Findings, others: Sequence[Findings] = ()) -> str:
    """Returns the HTML of a report on a run; `others` are the other runs of the folder."""
    style, script = (_asset(f"report.{kind}") for kind in ("css", "js"))
    title = f"{', '.join(found.plans) or 'Run'} – run {found.run.name}"
    sections = "\n".join(part for part in _sections(found, others) if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<link rel="icon" href="data:,">\n<title>{_text(title)}</title>\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n<main>\n{sections}\n</main>\n"
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _sections(found: Findings, others: Sequence[Findings]) -> Iterator[str]:
    yield _heading(found)
    yield _verdict(found)
    yield _tiles(found)
    yield _measured(found)
    yield _predicted(found)
    yield _partitions(found)
    yield _charts(found)
    yield _alternatives(found)
    for name, plan in found.plans.items():
        yield _picture(name, plan)
    yield _settings(found)
    yield _others(others)
    yield _notes(found)


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _text(value: object) -> str:
    return html.escape(str(value))


# --- the top -----------------------------------------------------------------------------------


def _heading(found: Findings) -> str:
    head = found.run.first.head
    names = ", ".join(f"'{name}'" for name in found.plans)
    begun = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(found.run.first.time_begun))
    lasted = max(rank.time for rank in found.run.ranks.values()) - found.run.first.time_begun
    machines = {str(r.head["environment"].get("machine", "")) for r in found.run.ranks.values()}
    parts = [
        f"{counted(found.num_partitions, 'partition')}",
        f"{counted(_whole(head['config'].get('microbatches')), 'microbatch')}",
        f"schedule '{head['config'].get('pipeline')}'",
        counted(found.run.size, "process"),
    ]
    if head["replicas"] > 1:
        parts.append(counted(head["replicas"], "replica"))
    if len(machines) > 1:
        parts.append(counted(len(machines), "machine"))
    return (
        f"<h1>{_text(f'Training of {names}' if names else 'Training run')}</h1>\n"
        f"<p>{_text(', '.join(parts))}</p>\n"
        f'<p class="faint">Run {_text(found.run.name)}, begun {begun}, {_text(found.state)} '
        f"after {counted(found.num_steps, 'step')} and {_text(format_seconds(lasted))}.</p>"
    )


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _verdict(found: Findings) -> str:
    lines = [
        f'<li class="{sentence.level}">{_text(sentence.text)}</li>' for sentence in found.verdict
    ]
    return f'<ul class="verdict">{"".join(lines)}</ul>' if lines else ""


def _tiles(found: Findings) -> str:
    tiles: list[tuple[str, str, str]] = []
    if found.step_seconds is not None:
        tiles.append(("Step, median", format_seconds(found.step_seconds), ""))
    if found.examples_per_second is not None:
        tiles.append(("Throughput", f"{format_count(found.examples_per_second)} examples/s", ""))
    if found.step is not None:
        predicted = found.predicted
        note = "" if predicted is None else f"predicted {_percent(predicted[1].bubble)}"
        tiles.append(("Bubble, measured", _percent(found.step.bubble), note))
    elif found.predicted is not None:
        tiles.append(("Bubble, predicted", _percent(found.predicted[1].bubble), ""))
    for name, value in (found.steps[-1].values if found.steps else {}).items():
        if name == "loss":
            tiles.append(("Last loss", f"{value:.4g}", ""))
    memory = _memory(found)
    if memory:
        most = max(memory, key=lambda m: m.peak_bytes)
        note = "of a process" if most.measured_by == "resident" else f"partition {most.partition}"
        tiles.append(("Peak memory", format_bytes(most.peak_bytes), note))
    cells = (
        f"<div><dt>{_text(name)}</dt><dd>{_text(value)}"
        f"{f'<small>{_text(note)}</small>' if note else ''}</dd></div>"
        for name, value, note in tiles
    )
    return f'<dl class="tiles">{"".join(cells)}</dl>' if tiles else ""


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


# --- timelines -----------------------------------------------------------------------------------


def _measured(found: Findings) -> str:
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
    names = [_row_name(row, several) for row in step.rows]
    return _timeline(
        f"Measured: step {step.step + 1}, {format_seconds(step.makespan_seconds)}, bubble "
        f"{_percent(step.bubble)}",
        "measured",
        names,
        events,
        step.makespan_seconds,
    )


def _row_name(row: Row, several: bool) -> str:
    return f"{row.replica} / {row.partition}" if several else f"partition {row.partition}"


def _predicted(found: Findings) -> str:
    if found.predicted is None:
        return ""
    graph, simulation = found.predicted
    events = [
        (device, simulation.start[action], simulation.end[action], action)
        for action, device in graph.device.items()
    ]
    seconds = simulation.makespan_seconds
    return _timeline(
        f"Predicted by the plan: {format_seconds(seconds)}, bubble {_percent(simulation.bubble)}",
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
        f"<h2>{_text(title)}</h2>\n"
        f'<div class="timeline" id="{name}"><div class="bar-of-tools">{tools}'
        f'<span class="keys faint">{keys}</span></div>'
        f'<svg role="img" tabindex="0" aria-label="{_text(title)}"></svg>'
        f'<p class="readout faint"></p>'
        "<noscript><p>Timelines are drawn by the script of this page, which is off.</p></noscript>"
        f'<script type="application/json">{_json(data)}</script></div>'
    )


def _json(data: object) -> str:
    """JSON that cannot end the element that it is in."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


# --- partitions ----------------------------------------------------------------------------------


def _memory(found: Findings) -> list[Memory]:
    rows = [m for rank in found.run.ranks.values() for m in rank.memory]
    return sorted(rows, key=lambda m: (m.rank, m.partition))


def _partitions(found: Findings) -> str:
    step, plan = found.step, found.plan
    memory = {(m.rank, m.partition): m for m in _memory(found)}
    ranks = [
        (rank, each.replica, partition)
        for rank, each in found.run.ranks.items()
        for partition in _owned(each.head)
    ]
    ranks.sort(key=lambda each: (each[1], each[2]))
    if not ranks:
        return ""
    microbatches = max(1, _whole(found.run.first.head["config"].get("microbatches")))
    several = len({replica for _, replica, _ in ranks}) > 1
    largest = max((m.peak_bytes for m in memory.values()), default=0)
    rows = []
    for rank, replica, partition in ranks:
        row = Row(replica, partition)
        cells = [_row_name(row, several), str(rank)]
        planned = None
        if plan is not None and plan.has_costs and partition < plan.num_partitions:
            planned = plan.rows[partition]
        for forward in (True, False):
            seconds = None
            if planned is not None:
                seconds = planned.forward_seconds if forward else planned.backward_seconds
            cells.append(_or_dash(seconds, format_seconds))
            cells.append(
                "–"
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
        busy = "–"
        if step is not None and row in step.rows and step.makespan_seconds:
            share = step.busy_seconds(row) / step.makespan_seconds
            busy = f"{_percent(share)}{bar(share, 1.0)}"
        handed = None if found.handover is None else found.handover.get(row)
        known = memory.get((rank, partition))
        cells = [_text(cell) for cell in cells]
        cells.append(busy)
        cells.append(_text(_or_dash(planned and planned.transfer_seconds, format_seconds)))
        per = None if handed is None else handed / microbatches
        cells.append(_text(_or_dash(per, format_seconds)))
        cells.append(_text(_or_dash(known and known.predicted_bytes, format_bytes)))
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
            "TensorFlow and the graphs, which are not predicted; in brackets, what was there before "
            "the model."
        )
    return (
        f'<h2>Partitions</h2>\n<div class="wide"><table class="partitions"><thead><tr>{titles}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
        f'<p class="faint">{_text(" ".join(notes))}</p>'
    )


def _owned(head: Mapping[str, Any]) -> list[int]:
    given = head.get("partitions")
    return [p for p in given if type(p) is int] if isinstance(given, list) else []


def _peak(known: Memory | None, largest: int) -> str:
    if known is None:
        return "–"
    if known.shares and known.partition != known.shares[0]:
        return f"with {known.shares[0]}"
    before = f" ({format_bytes(known.before_bytes)})" if known.before_bytes else ""
    return f"{format_bytes(known.peak_bytes)}{before}{bar(known.peak_bytes, largest)}"


def _or_dash(value: Any, shown: Any) -> str:
    return "–" if value is None else shown(value)


# --- charts --------------------------------------------------------------------------------------


def _charts(found: Findings) -> str:
    steps = found.steps
    if not steps:
        return ""
    values = dict.fromkeys(name for s in steps for name in s.values)
    losses = {
        name: [(float(s.last), s.values[name]) for s in steps if name in s.values]
        for name in values
        if "loss" in name
    }
    others = {
        name: [(float(s.last), s.values[name]) for s in steps if name in s.values]
        for name in values
        if "loss" not in name
    }
    for epoch in found.run.first.epochs:
        for name, value in epoch.values.items():
            if name not in values:
                chosen = losses if "loss" in name else others
                chosen.setdefault(name, []).append((float(epoch.last), value))
    warm = [s for s in steps if s.warm] or steps
    speed = [(float(s.last), s.examples / s.seconds) for s in warm if s.examples and s.seconds]
    charts = [("Losses", losses, "{:.4g}".format)] if losses else []
    if others:
        charts.append(("Other values", others, "{:.4g}".format))
    blocks = [
        f"<div><h2>{title}</h2>{line_chart(series, shown, title)}</div>"
        for title, series, shown in charts
    ]
    times = {"seconds of a step": [(float(s.last), s.seconds / s.count) for s in warm]}
    blocks.append(
        f"<div><h2>Time of a step</h2>{line_chart(times, format_seconds, 'Time of a step')}</div>"
    )
    if speed:
        drawn = line_chart({"examples per second": speed}, format_count, "Throughput")
        blocks.append(f"<div><h2>Throughput</h2>{drawn}</div>")
    note = ""
    if found.run.first.epochs:
        note = (
            '<p class="faint">Losses and metrics of fit are means since the beginning of their '
            "epoch. Steps that were traced or measured are left out of times.</p>"
        )
    return f'<div class="two">{"".join(blocks)}</div>{note}'


# --- other settings ------------------------------------------------------------------------------


def _alternatives(found: Findings) -> str:
    if not found.alternatives:
        return ""
    now = found.alternatives[0]
    rows = []
    for each in found.alternatives:
        what = ", ".join(
            counted(value, "microbatch") if key == "microbatches" else f"pipeline {value!r}"
            for key, value in each.settings.items()
            if isinstance(value, int | str)
        )
        change = each.seconds_per_microbatch / now.seconds_per_microbatch - 1
        cells = (
            what or "as it ran",
            _percent(each.step.bubble),
            format_seconds(each.step.seconds),
            "" if each is now else f"{100 * change:+.0f} %",
            format_bytes(each.step.peak_bytes),
            "yes" if each.step.fits else "NO",
        )
        mark = ' class="now"' if each is now else ""
        rows.append(f"<tr{mark}>{''.join(f'<td>{_text(cell)}</td>' for cell in cells)}</tr>")
    heads = ("settings", "bubble", "step", "time per microbatch", "fullest partition", "fits")
    titles = "".join(f"<th>{each}</th>" for each in heads)
    source = "times of the measured step" if found.simulated_with == "measured" else "plan's times"
    why = found.timed_plan[1]
    note = (
        f"Simulated with the {source}; transfers, the update of weights and memory are predicted. "
        "Microbatches have the same size, so that twice as many are a batch twice as large; in a "
        "batch of the same size each has fewer rows, and the bubble is the same if it takes as "
        "much less time."
    )
    if why and found.simulated_with != "measured":
        note += f" Measured times are not used: {why}."
    return (
        f'<h2>Other settings, simulated</h2>\n<div class="wide"><table><thead><tr>{titles}</tr>'
        f'</thead><tbody>{"".join(rows)}</tbody></table></div><p class="faint">{_text(note)}</p>'
    )


def _picture(name: str, plan: Plan) -> str:
    if not plan.has_costs:
        return ""
    from opensmp.compiler.plan.report.picture import draw_plan

    buffer = io.BytesIO()
    draw_plan(plan, schedule=False).savefig(buffer, format="svg", metadata={"Date": None})
    # An image can run no scripts, and its names do not mix with those of the page.
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    title = f"Plan of '{name}'"
    return (
        f"<h2>{_text(title)}</h2>\n"
        '<p><button type="button" data-full>Full size</button></p>'
        f'<div class="picture"><img alt="{_text(title)}: layers by partition, time and memory" '
        f'src="data:image/svg+xml;base64,{data}"></div>'
    )


def _settings(found: Findings) -> str:
    config = found.run.first.head["config"]
    default = Config(partitions=1).to_dict()
    rows = [
        (key, json.dumps(value) + ("" if key in default and value != default[key] else " (default)"))
        for key, value in config.items()
    ]
    environment = dict(found.run.first.head["environment"])
    machines = list(
        dict.fromkeys(str(r.head["environment"].get("machine")) for r in found.run.ranks.values())
    )
    environment["machine"] = ", ".join(machines)
    return (
        '<div class="two"><div><h2>Configuration</h2>'
        f"{_pairs(rows)}</div><div><h2>Environment</h2>{_pairs(environment.items())}</div></div>"
    )


def _pairs(rows: Iterable[tuple[object, object]]) -> str:
    made = "".join(f"<tr><td>{_text(k)}</td><td>{_text(v)}</td></tr>" for k, v in rows)
    return f'<table class="pairs"><tbody>{made}</tbody></table>'


def _others(others: Sequence[Findings]) -> str:
    if not others:
        return ""
    rows = []
    for each in others:
        cells = (
            each.run.name,
            each.state,
            str(each.num_steps),
            _or_dash(each.step_seconds, format_seconds),
            _or_dash(each.examples_per_second, format_count),
            "–" if each.step is None else _percent(each.step.bubble),
            _or_dash(each.steps[-1].values.get("loss") if each.steps else None, "{:.4g}".format),
        )
        rows.append(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in cells)}</tr>")
    heads = ("run", "state", "steps", "step", "examples/s", "bubble", "last loss")
    titles = "".join(f"<th>{each}</th>" for each in heads)
    return (
        f'<h2>Other runs in this folder</h2>\n<div class="wide"><table><thead><tr>{titles}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
        '<p class="faint">opensmp report --run NAME makes the page of one of them.</p>'
    )


def _notes(found: Findings) -> str:
    notes = list(found.faults)
    broken = sum(rank.broken for rank in found.run.ranks.values())
    if broken:
        notes.append(f"{counted(broken, 'line')} of the run's files cannot be read.")
    if len({str(r.head["environment"].get("machine")) for r in found.run.ranks.values()}) > 1:
        notes.append(
            "The ranks are on several machines, whose clocks may differ: in the measured timeline "
            "their rows may be shifted against each other, and with them bubble and hand-over."
        )
    if not known_pipeline(found) and found.plans:
        notes.append(
            "The schedule is one of your own, which files of plans do not have: predictions are "
            f"for '{found.plan.settings.pipeline if found.plan else 'interleaved'}'."
        )
    if not notes:
        return ""
    return f"<h2>Notes</h2><ul>{''.join(f'<li>{_text(note)}</li>' for note in notes)}</ul>"
