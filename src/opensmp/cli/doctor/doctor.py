"""`opensmp doctor`: the command."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from typing import Annotated

import typer

from opensmp.base import versions
from opensmp.base.message_text import counted
from opensmp.cli.doctor import machine, software, stack
from opensmp.cli.doctor.finding import Finding

_SIGNS = {"ok": "ok     ", "warning": "warning", "error": "ERROR  "}


def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, for reports of faults.")
    ] = False,
) -> None:
    """Looks at this machine: versions, devices, ports, variables, threads, memory, known faults.

    Each finding that is not well comes with the line that mends it. TensorFlow is looked at in a
    process of its own, which takes some seconds. Exit code 1 if opensmp cannot run here.
    """
    found = examine()
    if as_json:
        print(json.dumps(report(found), indent=2))
    else:
        for line in text(found):
            print(line)
    raise typer.Exit(1 if any(each.level == "error" for each in found) else 0)


def examine() -> list[Finding]:
    """Makes all checks."""
    environ = dict(os.environ)
    found = [
        *software.python(),
        *software.packages(software.installed()),
        *stack.findings(*stack.look(), environ),
        *machine.threads(environ),
        *machine.memory(),
        *machine.shared_memory(),
        *machine.ports(),
        *machine.files(),
        *machine.clock(),
        *software.launcher(environ),
        *software.configuration(environ),
    ]
    return found


def report(found: Sequence[Finding]) -> dict[str, object]:
    """The findings for a program to read."""
    return {
        "opensmp": versions.OWN,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "level": worst(found),
        "findings": [each._asdict() for each in found],
    }


def worst(found: Sequence[Finding]) -> str:
    """The worst level of all findings."""
    levels = [each.level for each in found]
    return next((level for level in ("error", "warning") if level in levels), "ok")


def text(found: Sequence[Finding]) -> list[str]:
    """The findings as lines for people, with a verdict at the end."""
    width = max((len(each.topic) for each in found), default=0)
    lines = []
    for each in found:
        first, *rest = each.text.splitlines() or [""]
        indent = " " * (len(_SIGNS["ok"]) + width + 4)
        lines.append(f"{_SIGNS[each.level]}  {each.topic:<{width}}  {first}")
        lines += [f"{indent}{line}" for line in rest]
        if each.mend:
            lines.append(f"{indent}mend: {each.mend}")
    errors = sum(each.level == "error" for each in found)
    warnings = sum(each.level == "warning" for each in found)
    if errors:
        verdict = f"{counted(errors, 'error')}: opensmp cannot run here until mended"
    elif warnings:
        verdict = f"opensmp can run here; {counted(warnings, 'warning')}"
    else:
        verdict = "all is well"
    return [*lines, "", verdict]
