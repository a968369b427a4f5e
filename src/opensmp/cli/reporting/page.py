"""The page of a report: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from typing import Any

from opensmp.base.message_text import counted
from opensmp.cli.reporting.charts import line_chart
from opensmp.cli.reporting.findings import Findings, known_pipeline, whole
from opensmp.cli.reporting.markup import duration, escaped, or_dash, percent
from opensmp.cli.reporting.tables import alternatives_table, memory_of, partitions_table
from opensmp.cli.reporting.timelines import measured_timeline, predicted_timeline
from opensmp.compiler.format import format_bytes, format_count, format_seconds
from opensmp.compiler.plan.plan import Plan
from opensmp.config import Config

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def page(found: Findings, others: Sequence[Findings] = ()) -> str:
    """Returns the HTML of a report on a run; `others` are the other runs of the folder."""
    style, script = (_asset(f"report.{kind}") for kind in ("css", "js"))
    title = f"{', '.join(found.plans) or 'Run'} - run {found.run.name}"
    sections = "\n".join(part for part in _sections(found, others) if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<link rel="icon" href="data:,">\n<title>{escaped(title)}</title>\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n<main>\n{sections}\n</main>\n"
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _sections(found: Findings, others: Sequence[Findings]) -> Iterator[str]:
    yield _heading(found)
    yield _verdict(found)
    yield _tiles(found)
    yield measured_timeline(found)
    yield predicted_timeline(found)
    yield partitions_table(found)
    yield _charts(found)
    yield alternatives_table(found)
    for name, plan in found.plans.items():
        yield _picture(name, plan)
    yield _settings(found)
    yield _others(others)
    yield _notes(found)


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


# --- the top -----------------------------------------------------------------------------------


def _heading(found: Findings) -> str:
    head = found.run.first.head
    names = ", ".join(f"'{name}'" for name in found.plans)
    begun = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(found.run.first.time_begun))
    lasted = max(rank.time for rank in found.run.ranks.values()) - found.run.first.time_begun
    machines = {str(r.head["environment"].get("machine", "")) for r in found.run.ranks.values()}
    parts = [
        f"{counted(found.num_partitions, 'partition')}",
        f"{counted(whole(head['config'].get('microbatches')), 'microbatch')}",
        f"schedule '{head['config'].get('pipeline')}'",
        counted(found.run.size, "process"),
    ]
    if head["replicas"] > 1:
        parts.append(counted(head["replicas"], "replica"))
    if len(machines) > 1:
        parts.append(counted(len(machines), "machine"))
    return (
        f"<h1>{escaped(f'Training of {names}' if names else 'Training run')}</h1>\n"
        f"<p>{escaped(', '.join(parts))}</p>\n"
        f'<p class="faint">Run {escaped(found.run.name)}, begun {begun}, {escaped(found.state)} '
        f"after {counted(found.num_steps, 'step')} and {escaped(duration(lasted))}.</p>"
    )


def _verdict(found: Findings) -> str:
    lines = [
        f'<li class="{sentence.level}">{escaped(sentence.text)}</li>' for sentence in found.verdict
    ]
    return f'<ul class="verdict">{"".join(lines)}</ul>' if lines else ""


def _tiles(found: Findings) -> str:
    tiles: list[tuple[str, str, str]] = []
    if found.step_seconds is not None:
        tiles.append(("Step, median", format_seconds(found.step_seconds), ""))
    if found.examples_per_second is not None:
        tiles.append(("Examples per second", format_count(found.examples_per_second), ""))
    if found.step is not None:
        predicted = found.predicted
        note = "" if predicted is None else f"predicted {percent(predicted[1].bubble)}"
        tiles.append(("Bubble, measured", percent(found.step.bubble), note))
    elif found.predicted is not None:
        tiles.append(("Bubble, predicted", percent(found.predicted[1].bubble), ""))
    for name, value in (found.steps[-1].values if found.steps else {}).items():
        if name == "loss":
            tiles.append(("Last loss", f"{value:.4g}", ""))
    memory = memory_of(found)
    if memory:
        most = max(memory, key=lambda m: m.peak_bytes)
        note = "of a process" if most.measured_by == "resident" else f"partition {most.partition}"
        tiles.append(("Peak memory", format_bytes(most.peak_bytes), note))
    cells = (
        f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}"
        f"{f'<small>{escaped(note)}</small>' if note else ''}</dd></div>"
        for name, value, note in tiles
    )
    return f'<dl class="tiles">{"".join(cells)}</dl>' if tiles else ""


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
    times = {"seconds of a step": [(float(s.last), s.seconds / s.num_steps) for s in warm]}
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
        f"<h2>{escaped(title)}</h2>\n"
        '<p><button type="button" data-full>Full size</button></p>'
        f'<div class="picture"><img alt="{escaped(title)}: layers by partition, time and memory" '
        f'src="data:image/svg+xml;base64,{data}"></div>'
    )


def _settings(found: Findings) -> str:
    config = found.run.first.head["config"]
    default = {**Config(partitions=1).to_dict(), "partitions": None}

    def is_default(key: str, value: Any) -> str:
        return " (default)" if value is not None and value == default.get(key) else ""

    rows = [
        (key, ("not set" if value is None else json.dumps(value)) + is_default(key, value))
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
    made = "".join(f"<tr><td>{escaped(k)}</td><td>{escaped(v)}</td></tr>" for k, v in rows)
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
            or_dash(each.step_seconds, format_seconds),
            or_dash(each.examples_per_second, format_count),
            "-" if each.step is None else percent(each.step.bubble),
            or_dash(each.steps[-1].values.get("loss") if each.steps else None, "{:.4g}".format),
        )
        rows.append(f"<tr>{''.join(f'<td>{escaped(cell)}</td>' for cell in cells)}</tr>")
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
    return f"<h2>Notes</h2><ul>{''.join(f'<li>{escaped(note)}</li>' for note in notes)}</ul>"
