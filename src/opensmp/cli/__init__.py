"""The command line: `opensmp plan`, `run`, `tune`, `simulate`, `report`, `doctor`, `example`."""

from __future__ import annotations

import platform
import sys
from typing import Annotated

import typer

from opensmp.base.versions import NAMES, OWN
from opensmp.cli.doctor.doctor import doctor
from opensmp.cli.doctor.software import installed
from opensmp.cli.plan import plan
from opensmp.cli.reporting.report import report
from opensmp.cli.run import run
from opensmp.cli.running.examples.example import example
from opensmp.cli.simulation.simulate import simulate
from opensmp.cli.tuning.tune import tune
from opensmp.errors import SmpError

app = typer.Typer(
    name="opensmp",
    help="Pipeline model parallelism for Keras models on TensorFlow.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # whose tables cut the names of options at 80 columns
)
app.command("doctor")(doctor)
app.command("example")(example)
app.command("plan")(plan)
app.command("simulate")(simulate)
app.command("report")(report)
app.command("run", context_settings={"allow_interspersed_args": False})(run)
app.command("tune", context_settings={"allow_interspersed_args": False})(tune)


def _print_versions(asked: bool) -> None:
    """Prints the versions of what a report of a fault should name; imports none of it."""
    if not asked:
        return
    print(f"opensmp {OWN}")
    print(f"Python {platform.python_version()}")
    for module, found in installed().items():
        listed = [f"{each} {version}" for each, version in found.items()]
        print(", ".join(listed) or f"{NAMES[module]} not installed")
    raise typer.Exit


@app.callback()
def _opensmp(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_versions, help="Show versions."),
    ] = False,
) -> None:
    """Pipeline model parallelism for Keras models on TensorFlow."""


def main() -> None:
    """Runs the command line; prints errors of type `SmpError` without a traceback."""
    try:
        app()
    except SmpError as error:
        # Errors of a command begin with its name.
        prefix = "" if str(error).startswith("opensmp ") else "opensmp: "
        print(f"{prefix}{error}", file=sys.stderr)
        sys.exit(error.exit_code)
