"""The numbers of a run report for TensorBoard, and its timeline as a trace."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from opensmp.api.timeline.record import relative
from opensmp.api.timeline.timeline import Timeline
from opensmp.distributed.world import World
from opensmp.execution.profiling.timestamps import Measurement

FOLDER = "tensorboard"


class RunScalars:
    """Writes the summaries of one rank of a run, `FOLDER/<run>/rank<n>`."""

    def __init__(self, folder: Path, run: str, here: World) -> None:
        self._folder = folder / FOLDER / run / f"rank{here.rank}"
        self._writer = tf.summary.create_file_writer(str(self._folder))
        self._digits = len(str(here.config.partitions - 1))

    def step(
        self, step: int, seconds: float, speed: float | None, values: Mapping[str, float]
    ) -> None:
        """Writes the numbers of a step; `speed` is examples per second."""
        self.values(step, {**values, "step_seconds": seconds})
        if speed is not None:
            self.values(step, {"examples_per_second": speed})

    def values(self, step: int, values: Mapping[str, float], prefix: str = "") -> None:
        """Writes scalars by name."""
        with self._writer.as_default(step), tf.summary.record_if(True):
            for name, value in values.items():
                tf.summary.scalar(f"{prefix}{name}", value)

    def memory(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes the peaks of partitions, in bytes."""
        for row in rows:
            found = {"peak_bytes": row["peak_bytes"]}
            if row["predicted_bytes"] is not None:
                found["predicted_peak_bytes"] = row["predicted_bytes"]
            self.values(step, found, self._partition(row["partition"]))

    def timeline(self, measured: Sequence[tuple[int, Measurement]]) -> None:
        """Writes what the partitions did in the measured steps, and the steps as a trace."""
        if not measured:
            return
        origin = min(float(each.seconds.min(initial=math.inf)) for _, each in measured)
        steps = [relative(each, step, origin) for step, each in measured]
        for step in steps:
            if not step.events:
                continue
            self.values(step.index + 1, {"bubble": step.bubble})
            for partition, device in enumerate(step.devices):
                own = [event for event in step.events if event.partition == partition]
                if not device or not own:
                    continue
                busy = math.fsum(event.seconds for event in own)
                found = {"busy_fraction": busy / step.makespan_seconds}
                for kind, name in (("F", "forward"), ("B", "backward"), ("W", "weight_gradient")):
                    some = [event.seconds for event in own if event.action.kind == kind]
                    if some:
                        found[f"{name}_seconds"] = math.fsum(some)
                self.values(step.index + 1, found, self._partition(partition))
        Timeline(steps).to_chrome_trace(self._folder / "timeline.trace.json")
        self.flush()

    def flush(self) -> None:
        """Makes what was written visible."""
        self._writer.flush()

    def _partition(self, number: int) -> str:
        return f"partition_{number:0{self._digits}}/"
