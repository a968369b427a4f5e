"""`opensmp tune`: measures a script's training steps with several settings."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from opensmp.base.message_text import shown
from opensmp.cli.options import checking, command, key_option
from opensmp.cli.run import check_script
from opensmp.cli.running.run_options import MOST_RANKS
from opensmp.cli.tuning.trials import Script, run_trial
from opensmp.config.keys import KEYS
from opensmp.errors import LaunchError
from opensmp.execution.profiling.tuning.report import table
from opensmp.execution.profiling.tuning.trial import Candidate, Outcome, settings

_ENOUGH_SECONDS = 1.0  # that a further candidate is worth starting


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
    outcomes = _Search(options).run()
    best = min(outcomes, key=lambda outcome: outcome.seconds)
    assert best.measured is not None
    console = Console()
    console.print(table(outcomes, best), highlight=False)
    for outcome in outcomes:
        if outcome.error:
            _print(console, f"{outcome.changes}: {outcome.error}")
    if outcomes[0].measured and outcomes[0].measured.note:
        _print(console, f"No predictions: {outcomes[0].measured.note}.")
    options.output.write_text(
        json.dumps(settings(best.measured), indent=2) + "\n", encoding="utf-8"
    )
    _print(
        console,
        f'best settings: {options.output}. Use them by smp.init("{options.output}") in the '
        "script, or, if the script gives none of these keys itself, by opensmp run --config "
        f"{options.output}",
    )


class _Search:
    """One search: the script's own settings first, then the candidates."""

    def __init__(self, options: TuneOptions) -> None:
        self._options = options
        self._script = Script(
            options.script, tuple(options.arguments or ()), options.processes, options.module
        )
        self._until = time.monotonic() + options.seconds
        self._console = Console(stderr=True)
        self._outcomes: list[Outcome] = []

    def run(self) -> list[Outcome]:
        """Measures all; raises `LaunchError` if the script fails with its own settings."""
        first = self._try(Candidate({}), "the settings of the script", self._options.candidates)
        if first.measured is None:
            raise LaunchError(
                f"opensmp tune: nothing could be measured with the settings of the script: "
                f"{first.error}\nThe end of its output:\n{first.tail}"
            )
        candidates = first.measured.candidates
        for number, candidate in enumerate(candidates, start=1):
            self._try(candidate, f"{number} of {len(candidates)}")
        if first.measured.size > 1 and "transport" not in self._options.flags:
            best = min(self._outcomes, key=lambda outcome: outcome.seconds)
            if first.measured.config["transport"] == "auto":
                changes = {**best.candidate.changes, "transport": "collective"}
                self._try(Candidate(changes, None), "the best, with collectives")
        return self._outcomes

    def _try(self, candidate: Candidate, number: str, more: int = 0) -> Outcome:
        left = self._until - time.monotonic()
        if self._outcomes and left < _ENOUGH_SECONDS:
            outcome = Outcome(candidate, error="not tried: the time was up; give more --seconds")
        else:
            text = f"opensmp tune: {number}: {Outcome(candidate).changes or 'as it is'}"
            if self._console.is_terminal:
                with self._console.status(text):
                    outcome = self._run(candidate, left, more)
            else:
                outcome = self._run(candidate, left, more)
            self._console.print(f"{text}: {outcome.told}", markup=False, highlight=False)
        self._outcomes.append(outcome)
        return outcome

    def _run(self, candidate: Candidate, left: float, more: int) -> Outcome:
        changes = {**candidate.changes, **self._options.flags}
        return run_trial(self._script, candidate, changes, self._options.steps, more, left)


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=not console.is_terminal)
