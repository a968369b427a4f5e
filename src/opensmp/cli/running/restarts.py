"""Decides whether a run is restarted after a failure, and with how many ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opensmp.cli.running.output import say
from opensmp.cli.running.process_group import RunResult
from opensmp.distributed import world
from opensmp.distributed.launch.init_markers import Layout
from opensmp.distributed.watchdog.verdicts.deadlock import listed
from opensmp.errors import ConfigError

_USAGE, _INTERRUPTED = 2, 130


class Restarts:
    """Counts restarts and the remaining ranks.

    A run is not restarted if it succeeded, if the launcher received a signal, or if the exit code
    says that it would fail again in the same way: 2 (wrong usage) and 130 (Ctrl-C).

    With `least`, a rank counts as lost if it was killed by a signal that is no request to exit, as
    when memory runs out, or if it had not called `smp.init` in two consecutive failed runs. The
    next run uses the largest number of remaining ranks that makes up whole replicas.

    Args:
        most: Maximum number of restarts.
        size: Number of ranks.
        least: Minimum number of ranks; None to always use the initial number.
        layout: The layout of the model according to the flags; None if unknown.

    Attributes:
        number: Index of the current run, from 0.
        size: Number of ranks of the current run.
    """

    def __init__(self, most: int, size: int, least: int | None, layout: Layout | None) -> None:
        self._most, self._least, self._layout = most, least, layout
        self._absent: set[int] = set()  # ranks missing from smp.init at the end of the previous run
        self.number, self.size = 0, size

    def again(self, outcome: RunResult, marks: Mapping[int, Layout]) -> bool:
        """Decides whether to restart, updates `number` and `size`, and prints the decision."""
        if outcome.failed_rank is None or outcome.signal is not None or not self._most:
            return False
        if outcome.exit_code in (_USAGE, _INTERRUPTED):
            say(f"no restart: exit code {outcome.exit_code} would come again")
            return False
        if self.number == self._most:
            return False
        lost = self._lost(outcome, marks)
        ranks = "all ranks are"
        if lost:
            size = self._fitting(self.size - len(lost), marks)
            if size is None:
                say(
                    f"no restart: {listed(lost)} lost, and with the {self.size - len(lost)} left "
                    f"of {self.size} there is no number of ranks from --min-procs {self._least} on "
                    "that makes up whole replicas"
                )
                return False
            ranks = f"{listed(lost)} lost: {size} of {self.size} ranks are"
            self.size, self._absent = size, set()
        self.number += 1
        say(f"restart {self.number} of {self._most}: {ranks} started again")
        return True

    def _lost(self, outcome: RunResult, marks: Mapping[int, Layout]) -> list[int]:
        if self._least is None:
            return []
        absent = set(range(self.size)) - set(marks) if marks else set()
        twice, self._absent = absent & self._absent, absent
        return sorted({*outcome.lost, *twice})

    def _fitting(self, most: int, marks: Mapping[int, Layout]) -> int | None:
        """Largest number of ranks up to `most` that makes up whole replicas; None if none."""
        layout = next(iter(marks.values()), self._layout)
        for size in range(most, (self._least or 1) - 1, -1):
            if makes_whole_replicas(size, layout):
                return size
        return None


def makes_whole_replicas(size: int, layout: Layout | None) -> bool:
    """Whether so many ranks make up whole replicas of the model; True if its layout is unknown."""
    if layout is None:
        return True
    try:
        world.replica_size(size, layout.partitions, layout.processes_per_replica)
    except ConfigError:
        return False
    return True


def known_layout(flags: Mapping[str, Any]) -> Layout | None:
    """Layout of the model according to the flags; None without `partitions`."""
    if "partitions" not in flags:
        return None
    return Layout(flags["partitions"], flags.get("processes_per_replica"))
