"""`opensmp report`: the command."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from opensmp.base.message_text import shown
from opensmp.base.requirements import require_tensorflow
from opensmp.errors import PlanError, SavingError

if TYPE_CHECKING:
    from opensmp.cli.reporting.findings import Findings
    from opensmp.cli.reporting.run_folder import Run


def report(
    folder: Annotated[Path, typer.Argument(help="The folder of an smp.RunReport.")],
    output: Annotated[
        Path | None,
        typer.Option(help="HTML file to write; report.html in the folder by default."),
    ] = None,
    run: Annotated[
        str | None, typer.Option(help="Which run, if there are several; by default the last.")
    ] = None,
) -> None:
    """Makes a page of what a run has written: timelines, bubble, memory, losses, a verdict.

    The page is one HTML file that loads nothing from anywhere. The run may still be going on.
    """
    from opensmp.cli.reporting.run_folder import read_runs

    runs = read_runs(folder)
    chosen = _chosen(runs, run)
    try:
        require_tensorflow()
    except ImportError as error:
        raise PlanError(f"opensmp report: {error}") from error
    from opensmp.cli.reporting.page import page

    found = _findings(chosen)
    others = [_findings(each) for each in reversed(runs) if each is not chosen]
    path = output or folder / "report.html"
    _write(path, page(found, others))
    for sentence in found.verdict:
        print(sentence.text)
    print(f"\nwritten: {path}")


def _chosen(runs: list[Run], name: str | None) -> Run:
    if name is None:
        return runs[-1]
    for each in runs:
        if each.name == name:
            return each
    raise SavingError(
        f"opensmp report: there is no run {shown(name)} in this folder; there are "
        f"{', '.join(each.name for each in runs)}."
    )


def _findings(run: Run) -> Findings:
    import time

    from opensmp.cli.reporting.findings import Findings
    from opensmp.compiler.plan.plan import Plan

    plans: dict[str, Plan] = {}
    faults = []
    for path in run.plans:
        try:
            plan = Plan.load(path)
        except PlanError as error:
            faults.append(str(error))
        else:
            name = plan.model if plan.model not in plans else f"{plan.model} ({len(plans) + 1})"
            plans[name] = plan
    return Findings(run, plans, time.time(), tuple(faults))


def _write(path: Path, text: str) -> None:
    """Writes a file whole, or leaves what was there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".report-", suffix=".html")
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(text)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise SavingError(
            f"opensmp report: {shown(str(path), 200)} cannot be written: {error.strerror}. Give "
            "another file with --output."
        ) from error
