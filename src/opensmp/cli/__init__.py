"""The command line: `opensmp plan` and `opensmp run`."""

from __future__ import annotations

import sys

import typer

from opensmp.cli.plan import plan
from opensmp.cli.run import run
from opensmp.errors import SmpError

app = typer.Typer(
    name="opensmp",
    help="Pipeline model parallelism for Keras models on TensorFlow.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("plan")(plan)
app.command("run", context_settings={"allow_interspersed_args": False})(run)


@app.callback()
def _opensmp() -> None:
    """Pipeline model parallelism for Keras models on TensorFlow."""


def main() -> None:
    """Runs the command line; prints errors of type `SmpError` without a traceback."""
    try:
        app()
    except SmpError as error:
        print(f"opensmp: {error}", file=sys.stderr)
        sys.exit(1)
