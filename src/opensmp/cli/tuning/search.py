"""What `opensmp tune` does: runs the script with each candidate, and tells the best."""

from __future__ import annotations

import time

from rich.console import Console

from opensmp.cli.tuning.trials import Script, run_trial
from opensmp.cli.tuning.tune import TuneOptions
from opensmp.errors import LaunchError
from opensmp.execution.profiling.tuning.report import table
from opensmp.execution.profiling.tuning.trial import Candidate, Outcome, save_settings, settings

_ENOUGH_SECONDS = 1.0  # that a further candidate is worth starting


def search(options: TuneOptions) -> None:
    """Measures, prints the table and writes the file."""
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
    save_settings(settings(best.measured), options.output)
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
