"""`opensmp tune`: measures a script's training steps with several settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from opensmp.base.message_text import shown
from opensmp.cli.options import checking, command, key_option
from opensmp.cli.run import check_script
from opensmp.cli.running.run_options import MOST_RANKS
from opensmp.config.keys import KEYS
from opensmp.errors import LaunchError


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """What is given on the command line of `opensmp tune`.

    Attributes:
        flags: The keys of the configuration that were given, and so are not varied.
    """

    script: Annotated[
        str,
        typer.Argument(metavar="SCRIPT [ARGS]...", help="The Python script; then its arguments."),
    ]
    arguments: Annotated[list[str] | None, typer.Argument(hidden=True)] = None
    processes: Annotated[
        int, typer.Option("-n", "--processes", min=1, max=MOST_RANKS, help="Number of ranks.")
    ] = 1
    module: Annotated[
        bool, typer.Option("-m", "--module", help="SCRIPT is the name of a module.")
    ] = False
    seconds: Annotated[
        float, typer.Option(min=1.0, help="Time for everything; what is not tried then is told.")
    ] = 600.0
    steps: Annotated[
        int, typer.Option(min=1, max=10_000, help="Training steps that are measured of each.")
    ] = 10
    candidates: Annotated[
        int, typer.Option(min=1, max=100, help="Settings to try beside those of the script.")
    ] = 6
    output: Annotated[
        Path, typer.Option(metavar="FILE.json", help="Write the best settings here.")
    ] = Path("tuned.json")
    flags: Mapping[str, Any]


_FIXED = " It holds for all runs, and is not varied."


@command(TuneOptions, [key_option(name, help=KEYS[name].help + _FIXED) for name in KEYS])
def tune(options: TuneOptions) -> None:
    """Finds the fastest settings of a training script by measuring.

    The script runs once with its own settings and once with each of some others, which the
    cost model ranks: numbers of microbatches, schedules, pieces per partition, transports.
    Each run ends after a few training steps, without the rest of the script. The best settings
    are written to a file for smp.init and for opensmp run --config.
    """
    with checking():
        check_script(options.script, options.module, None, "opensmp tune")
        if not options.output.absolute().parent.is_dir():
            parent = shown(str(options.output.absolute().parent))
            raise LaunchError(
                f"opensmp tune --output {shown(str(options.output))}: there is no directory "
                f"{parent}. Make it, or give another path."
            )
    # Imported here: help needs no tables.
    from opensmp.cli.tuning.search import search

    search(options)
