"""What can be said about a run: its numbers, those of its plan, and a verdict in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from opensmp.base.message_text import counted
from opensmp.cli.reporting.markup import duration
from opensmp.cli.reporting.measured_step import MeasuredStep, Row, measured_steps, typical
from opensmp.cli.reporting.run_folder import Run, Steps
from opensmp.compiler.format import format_bytes, format_seconds
from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.schedule.actions import TaskGraph
from opensmp.compiler.schedule.simulate import Simulation
from opensmp.compiler.simulation.measured import (
    Alternative,
    alternatives,
    recut,
    with_measured_seconds,
)
from opensmp.compiler.simulation.plan_step import timed_passes
from opensmp.config.pipelines import PIPELINES
from opensmp.errors import PlanError, ScheduleError

_GAIN = 0.02  # what is less is not worth a word
_LEAST_BUBBLE = 0.02
_SMALL_BUBBLE = 0.1
_UNEVEN = 1.1
_STALE = 60.0


class Sentence(NamedTuple):
    """A sentence of the verdict; `level` is `"good"`, `"note"` or `"bad"`."""

    level: str
    text: str


@dataclass(frozen=True)
class Findings:
    """A run with what follows from it; `now` is the time of the report, seconds since the epoch."""

    run: Run
    plans: Mapping[str, Plan]
    now: float
    faults: Sequence[str] = field(default=())

    # --- the run --------------------------------------------------------------------------

    @cached_property
    def steps(self) -> Sequence[Steps]:
        """The steps of the first rank."""
        return self.run.first.steps

    @property
    def num_steps(self) -> int:
        """Number of steps that have run."""
        return self.steps[-1].last if self.steps else 0

    @cached_property
    def step_seconds(self) -> float | None:
        """Median duration of a step, without those that were traced or measured."""
        warm = [s for s in self.steps if s.warm] or list(self.steps)
        weighted = sorted((s.seconds / s.num_steps, s.num_steps) for s in warm)
        half, total = sum(count for _, count in weighted) / 2, 0.0
        for seconds, count in weighted:
            total += count
            if total >= half:
                return seconds
        return None

    @cached_property
    def examples_per_second(self) -> float | None:
        """Median examples per second of the same steps."""
        speeds = [s.examples / s.seconds for s in self.steps if s.warm and s.examples and s.seconds]
        return statistics.median(speeds) if speeds else None

    @property
    def num_partitions(self) -> int:
        """Partitions of a replica."""
        return int(self.run.first.head["config"]["partitions"])

    @property
    def error(self) -> str:
        """The error that ended the run; empty if there was none."""
        return next((r.end.error for r in self.run.ranks.values() if r.end and r.end.error), "")

    @property
    def state(self) -> str:
        """How the run ended, in a few words."""
        if self.error:
            return "ended with an error"
        if all(rank.end is not None for rank in self.run.ranks.values()):
            return "finished"
        silent = self.now - max(rank.time for rank in self.run.ranks.values())
        return "running" if silent < _STALE else "stopped without an end: killed, or stuck"

    # --- a step ---------------------------------------------------------------------------

    @cached_property
    def step(self) -> MeasuredStep | None:
        """The measured step that is shown."""
        return typical(measured_steps(self.run))

    @cached_property
    def plan(self) -> Plan | None:
        """The plan, if there is one of one model only."""
        return next(iter(self.plans.values())) if len(self.plans) == 1 else None

    @cached_property
    def predicted(self) -> tuple[TaskGraph, Simulation] | None:
        """The passes of the plan, and when they would run."""
        try:
            return None if self.plan is None else timed_passes(self.plan)
        except (PlanError, ScheduleError):
            return None

    @cached_property
    def handover(self) -> Mapping[Row, float] | None:
        """Idle time of each partition although inputs were computed, in seconds of the step."""
        if self.step is None or self.predicted is None:
            return None
        return self.step.handover_seconds(self.predicted[0].needs)

    @cached_property
    def timed_plan(self) -> tuple[Plan | None, str]:
        """The plan with measured times of passes and hand-overs; or None, and why."""
        if self.plan is None:
            return None, f"the run has {counted(len(self.plans), 'plan')}" if self.plans else ""
        if self.step is None:
            return None, "no step was measured"
        if len(self.step.calls) > 1:
            return None, f"a step calls {len(self.step.calls)} functions"
        first = self.step.rows[0].replica
        timed = [
            (event.action, event.row.partition, event.seconds)
            for event in self.step.events
            if event.row.replica == first
        ]
        gaps = None if self.predicted is None else self.step.handovers(self.predicted[0].needs)
        each = [seconds for _, seconds in gaps or ()]
        return with_measured_seconds(self.plan, timed, statistics.median(each) if each else None)

    @cached_property
    def alternatives(self) -> Sequence[Alternative]:
        """Simulations with other settings; the first is with those of the run."""
        plan = self.timed_plan[0] or self.plan
        if plan is None or self.num_partitions == 1:
            return ()
        try:
            return alternatives(plan, int(self.run.first.head["replicas"]))
        except (PlanError, ScheduleError):
            return ()

    @property
    def simulated_with(self) -> str:
        """What times the simulations are made with."""
        return "measured" if self.timed_plan[0] is not None else "predicted"

    # --- in words -------------------------------------------------------------------------

    @cached_property
    def verdict(self) -> Sequence[Sentence]:
        """What is well, and what could be better."""
        return [
            *self._of_end(),
            *self._of_values(),
            *self._of_bubble(),
            *self._of_schedules(),
            *self._of_balance(),
            *self._of_memory(),
        ]

    def _of_end(self) -> Iterator[Sentence]:
        if self.error:
            first = (self.error.strip().splitlines() or [""])[0]
            yield Sentence("bad", f"The run ended after {self._steps} with {first.rstrip(': ')}")
        elif self.state != "finished":
            silent = duration(self.now - max(r.time for r in self.run.ranks.values()))
            level = "note" if self.state == "running" else "bad"
            yield Sentence(
                level,
                f"The run has not ended: {self._steps} so far, and nothing was written for "
                f"{silent} before this report.",
            )
        missing = self.run.size - len(self.run.ranks)
        if missing:
            yield Sentence(
                "bad",
                f"{counted(missing, 'rank')} of {self.run.size} wrote nothing into this folder. "
                "Ranks of several machines need a folder that all of them see.",
            )

    @property
    def _steps(self) -> str:
        return counted(self.num_steps, "step")

    def _of_values(self) -> Iterator[Sentence]:
        names = dict.fromkeys(name for s in self.steps for name in s.values if "loss" in name)
        for name in names:
            known = [(s.last, s.values[name]) for s in self.steps if name in s.values]
            odd = next((step for step, value in known if not math.isfinite(value)), None)
            if odd is not None:
                yield Sentence(
                    "bad",
                    f"'{name}' is {_odd(dict(known)[odd])}, first at step {odd}. "
                    'smp.init({"check_finite": True}) names the layer and the microbatch.',
                )
            elif len(known) > 1:
                first, last = known[0][1], known[-1][1]
                how = "fell" if last < first else "rose" if last > first else "stayed"
                level = "good" if last < first else "note"
                yield Sentence(level, f"'{name}' {how} from {first:.4g} to {last:.4g}.")

    def _of_bubble(self) -> Iterator[Sentence]:
        if self.num_partitions == 1:
            yield Sentence("note", "There is one partition, so that there is no pipeline.")
            return
        parts = []
        if self.step is not None:
            parts.append(f"{_percent(self.step.bubble)} measured")
        if not self.alternatives:
            if parts:
                yield Sentence("note", f"Bubble {parts[0]}. {self._why_not}".strip())
            return
        now, *others = self.alternatives
        parts.append(
            f"{_percent(now.step.bubble)} simulated with the {self.simulated_with} times of passes"
        )
        more = [a for a in others if "microbatches" in a.settings and a.step.fits]
        gains = [a for a in more if a.step.bubble < now.step.bubble - _LEAST_BUBBLE]
        if gains:
            would = " and ".join(
                f"{a.step.run.microbatches} microbatches would give {_percent(a.step.bubble)}"
                for a in gains
            )
            parts[-1] += f": {would}, of the same size each"
        level = "good" if now.step.bubble < _SMALL_BUBBLE and not gains else "note"
        yield Sentence(level, f"Bubble {', '.join(parts)}.")

    @property
    def _why_not(self) -> str:
        why = self.timed_plan[1]
        return f"Other settings are not simulated: {why}." if why else ""

    def _of_schedules(self) -> Iterator[Sentence]:
        others = [a for a in self.alternatives if "pipeline" in a.settings and a.step.fits]
        if not others:
            return
        now = self.alternatives[0]
        best = min(others, key=lambda a: a.step.seconds)
        gain = 1 - best.step.seconds / now.step.seconds if now.step.seconds else 0.0
        if gain > _GAIN:
            yield Sentence(
                "note",
                f"The pipeline {best.settings['pipeline']!r} would give a bubble of "
                f"{_percent(best.step.bubble)} and steps {_percent(gain)} shorter, with "
                f"{format_bytes(best.step.peak_bytes)} instead of "
                f"{format_bytes(now.step.peak_bytes)} in the fullest partition (simulated).",
            )
        else:
            yield Sentence(
                "good",
                f"None of {counted(len(others), 'other schedule')} would make steps more than "
                f"{_percent(_GAIN)} shorter (simulated).",
            )

    def _of_balance(self) -> Iterator[Sentence]:
        step, plan = self.step, self.timed_plan[0]
        if step is None or len(step.rows) < 2:
            return
        busy = {row: step.work_seconds(row) for row in step.rows}
        mean = statistics.fmean(busy.values())
        slowest = max(busy, key=lambda row: busy[row])
        ratio = busy[slowest] / mean if mean else 1.0
        if ratio <= _UNEVEN:
            yield Sentence(
                "good", f"The partitions are even: the busiest has {ratio:.2f} x the mean."
            )
            return
        where = f" of replica {slowest.replica}" * (len({row.replica for row in busy}) > 1)
        text = f"Partition {slowest.partition}{where} has {ratio:.2f} x the mean work."
        better = None if plan is None else recut(plan)
        if better is not None and better[1] < (1 - _GAIN) * better[0]:
            text += (
                f' Cut by the measured times for speed ("optimize": "speed"), the slowest would '
                f"take {format_seconds(better[1])} instead of {format_seconds(better[0])} for a "
                "microbatch."
            )
        elif better is not None:
            text += " With the measured times, automatic partitioning finds no faster cut."
        yield Sentence("note", text)

    def _of_memory(self) -> Iterator[Sentence]:
        rows = [m for rank in self.run.ranks.values() for m in rank.memory]
        counted_rows = [m for m in rows if m.measured_by == "allocator" and m.predicted_bytes]
        if counted_rows:
            fullest = max(counted_rows, key=lambda m: m.peak_bytes)
            yield Sentence(
                "good",
                f"Partition {fullest.partition} needed most memory: "
                f"{format_bytes(fullest.peak_bytes)}, predicted "
                f"{format_bytes(fullest.predicted_bytes or 0)}.",
            )


def known_pipeline(findings: Findings) -> bool:
    """Whether the schedule of the run is one that plans know, and not one of a user's own."""
    return findings.run.first.head["config"].get("pipeline") in PIPELINES


def whole(value: Any) -> int:
    """A number of a configuration that was read; 0 if it is none."""
    return value if isinstance(value, int) else 0


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _odd(value: float) -> str:
    return "NaN" if math.isnan(value) else "infinite"
