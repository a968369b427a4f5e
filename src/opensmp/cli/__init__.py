"""The command line: `opensmp plan` and `opensmp run`."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from opensmp.cli.run import run
from opensmp.errors import SmpError


class _Commands(TyperGroup):
    """Command group that imports `plan` lazily.

    `plan` imports TensorFlow, which `run` does not need and would keep in memory while its ranks
    run.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        return ["plan", *super().list_commands(ctx)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name != "plan":
            return super().get_command(ctx, cmd_name)
        from opensmp.cli.plan import plan

        alone = typer.Typer(add_completion=False)
        alone.command("plan")(plan)
        return typer.main.get_command(alone)


app = typer.Typer(
    cls=_Commands,
    name="opensmp",
    help="Pipeline model parallelism for Keras models on TensorFlow.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
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
