"""What one rank writes of one run into the folder of an `smp.RunReport`."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from opensmp.api.measurement.memory_report import memory_report
from opensmp.api.timeline.run_scalars import RunScalars
from opensmp.base.versions import OWN
from opensmp.config.pipelines import pipeline_name
from opensmp.distributed.collectives.objects import broadcast_object
from opensmp.distributed.world import DP_GROUP, WORLD, World
from opensmp.errors import SmpError
from opensmp.execution.models import registry
from opensmp.execution.profiling import run_files
from opensmp.execution.profiling.timestamps import FIT, Measurement, listening
from opensmp.saving.atomic import explained, new_file

_logger = logging.getLogger("opensmp")

_FIRST_RECORDED = 2
"""Steps before the recorded ones: the first is traced, and the second is for short runs to have."""

_SECONDS_BETWEEN_LINES = 0.25
_LONGEST_ERROR = 500
_CODES = re.compile(r"\x1b\[[0-9;]*m")  # colours


class RunRecording:
    """One run in one rank; all ranks make it at the same time."""

    def __init__(self, folder: Path, here: World, timeline_steps: int, tensorboard: bool) -> None:
        ranks = here.group(WORLD)
        name = run_files.new_run()
        if here.size > 1:
            name = broadcast_object(name, ranks, 0, "smp.RunReport")
        self.name = name
        self.world = here
        self.step = 0
        self._folder = folder
        self._window = range(_FIRST_RECORDED, _FIRST_RECORDED + timeline_steps)
        self._listening = contextlib.ExitStack()
        self._is_listening = False
        self._measured: list[tuple[int, Measurement]] = []
        self._has_plans = self._is_broken = False
        self._buffer: dict[str, Any] = {}
        self._written = 0.0
        with explained(folder / "run"):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = run_files.RunFile(run_files.rank_file(folder, name, here.rank))
            self._file.append("run", _head(name, here))
        self._scalars = RunScalars(folder, name, here) if tensorboard else None

    # --- steps ------------------------------------------------------------------------------

    def before_step(self) -> None:
        """Measures the next step if it is one of those to record."""
        if self.step in self._window and not self._is_listening:
            self._listening.enter_context(listening(self._add))
            self._is_listening = True
        elif self.step not in self._window:
            self.stop_listening()

    def after_steps(
        self,
        count: int,
        seconds: float,
        examples: int | None,
        values: Mapping[str, float],
        traced: bool = False,
    ) -> None:
        """Takes note of `count` steps that took so long together, perhaps with a trace."""
        steps = range(self.step, self.step + count)
        is_warm = not traced and 0 not in steps and not any(each in self._window for each in steps)
        self.step += count
        self._note(count, seconds, examples, values, is_warm)
        if self._scalars is not None:
            speed = examples / seconds if examples and seconds else None
            self._scalars.step(self.step, seconds / count, speed, values)
        if not self._has_plans and registry.plans(self.world):
            self._has_plans = True
            self._guarded(self._write_plans)
            self._write_memory()
        if self._measured and self.step >= self._window.stop:
            self._write_timeline()

    def _note(
        self,
        count: int,
        seconds: float,
        examples: int | None,
        values: Mapping[str, float],
        is_warm: bool,
    ) -> None:
        """Joins short steps into one line, but not across kinds of steps."""
        buffer = self._buffer
        if buffer and (buffer["warm"] != is_warm or (buffer["examples"] is None) != (not examples)):
            self._flush()
            buffer = self._buffer
        if not buffer:
            buffer.update(count=0, seconds=0.0, examples=0 if examples else None, warm=is_warm)
        buffer["count"] += count
        buffer["seconds"] += seconds
        if examples:
            buffer["examples"] += examples
        buffer.update(last=self.step, time=time.time(), values=dict(values))
        is_odd = any(value - value != 0 for value in values.values())  # NaN or infinite
        if is_odd or not is_warm or time.monotonic() - self._written >= _SECONDS_BETWEEN_LINES:
            self._flush()

    def _flush(self) -> None:
        if self._buffer:
            line, self._buffer = self._buffer, {}
            self._written = time.monotonic()
            self._append("steps", line)

    def end_epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Takes note of an epoch, from 0."""
        self._flush()
        self._append("epoch", {"epoch": epoch, "last": self.step, "values": dict(values)})
        if self._scalars is not None:
            self._scalars.values(self.step, values, "epoch/")
        self._write_memory()

    def end(self, error: BaseException | None) -> None:
        """Takes note that training has ended here."""
        self.stop_listening()
        self._flush()
        if self._measured:
            self._write_timeline()
        self._write_memory()
        text = "" if error is None else _CODES.sub("", f"{type(error).__name__}: {error}")
        text = text[:_LONGEST_ERROR]
        self._append("end", {"time": time.time(), "step": self.step, "error": text})
        if self._scalars is not None:
            self._scalars.flush()

    def stop_listening(self) -> None:
        """Measures no further step."""
        self._listening.close()
        self._is_listening = False

    # --- what is written --------------------------------------------------------------------

    def _add(self, measured: Measurement) -> None:
        step = self.step
        if measured.name == FIT:  # one call of Keras may run several
            step = max([step, *(known + 1 for known, _ in self._measured)])
        self._measured.append((step, measured))

    def _write_timeline(self) -> None:
        found, self._measured = self._measured, []
        for step, each in found:
            self._append(
                "timeline",
                {
                    "step": step,
                    "name": each.name,
                    "devices": list(each.devices),
                    "actions": [action.text for action in each.actions],
                    "partitions": list(each.partitions),
                    "seconds": each.seconds.tolist(),
                },
            )
        if self._scalars is not None:
            self._scalars.timeline(found)

    def _write_memory(self) -> None:
        if not self._has_plans:
            return
        rows = [
            row for row in memory_report().as_dict()["partitions"] if row["peak_bytes"] is not None
        ]
        self._append("memory", {"step": self.step, "partitions": rows})
        if self._scalars is not None:
            self._scalars.memory(self.step, rows)

    def _write_plans(self) -> None:
        if self.world.rank:
            return
        plans = sorted(registry.plans(self.world), key=lambda plan: plan.model)
        for number, plan in enumerate(plan for plan in plans if plan.has_costs):
            with new_file(run_files.plan_file(self._folder, self.name, number)) as path:
                plan.save(path)

    def _append(self, kind: str, values: Mapping[str, Any]) -> None:
        self._guarded(lambda: self._file.append(kind, values))

    def _guarded(self, write: Callable[[], None]) -> None:
        """Training goes on if the report cannot be written; a warning says so once."""
        if self._is_broken:
            return
        try:
            write()
        except (OSError, SmpError) as error:
            self._is_broken = True
            _logger.warning(
                "smp.RunReport: %s cannot be written: %s. Training goes on without a report; what "
                "was written before is still there.",
                self._folder,
                error,
            )


def _head(name: str, here: World) -> dict[str, Any]:
    """The first line of a rank's file."""
    config = here.config.to_dict()
    config["pipeline"] = pipeline_name(here.config.pipeline)
    return {
        "format": run_files.FORMAT,
        "version": run_files.VERSION,
        "run": name,
        "time": time.time(),
        "rank": here.rank,
        "size": here.size,
        "replica": here.rank_in(DP_GROUP),
        "replicas": len(here.dp_group),
        "partitions": list(here.my_partitions),
        "devices": [here.devices[partition] for partition in here.my_partitions],
        "config": config,
        "environment": {
            "opensmp": OWN,
            "Python": platform.python_version(),
            "TensorFlow": tf.__version__,
            "Keras": keras.__version__,
            "system": platform.platform(),
            "machine": platform.node(),
            "CPU cores": str(_cores()),
            "GPUs": str(len(tf.config.list_physical_devices("GPU"))),
            # Without arguments, which may hold secrets.
            "script": os.path.basename(sys.argv[0]) if sys.argv else "",
        },
    }


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
