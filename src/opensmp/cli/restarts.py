"""Whether ranks are started again after a run has ended, and how many."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from opensmp.cli.process_group import Outcome
from opensmp.distributed import world
from opensmp.distributed.launch.init_markers import Layout
from opensmp.distributed.watchdog.deadlock import listed
from opensmp.errors import ConfigError

_USAGE, _INTERRUPTED = 2, 130


class Restarts:
    """Counts restarts, and the ranks that are left.

    A run is not started again if it ended well, if the launcher got a signal, or with an exit
    code that says that it would end in the same way: 2, wrong usage, and 130, Ctrl-C.

    With `least`, a rank counts as lost if it was ended by a signal that asks for nothing, as the
    system does for want of memory; or if it was not in `smp.init` when a run failed, twice in a
    row. The next run has as many ranks as are left and make up whole replicas.

    Args:
        most: How many restarts there may be.
        size: Number of ranks.
        least: How many ranks there must be; None: always as many as at first.
        layout: The layout of the model, as far as the flags say it.

    Attributes:
        number: Number of the run, from 0.
        size: Number of its ranks.

    Example:
        ```python
        restarts = Restarts(3, size=4, least=2, layout=Layout(2, None))
        restarts.again(Outcome(137, 3, None, 9.0, lost=(3,)), {})  # True
        restarts.size  # 2: two partitions
        ```
    """

    def __init__(self, most: int, size: int, least: int | None, layout: Layout | None) -> None:
        self._most, self._least, self._layout = most, least, layout
        self._absent: set[int] = set()  # at the end of the run before
        self.number, self.size = 0, size

    def again(self, outcome: Outcome, marks: Mapping[int, Layout]) -> bool:
        """Whether there is another run, of `size` ranks; says so.

        Args:
            outcome: How the run has ended.
            marks: The ranks that have called `smp.init`, and the layout that each knows.
        """
        if outcome.failed_rank is None or outcome.signal is not None or not self._most:
            return False
        if outcome.exit_code in (_USAGE, _INTERRUPTED):
            _say(f"no restart: exit code {outcome.exit_code} would come again")
            return False
        if self.number == self._most:
            return False
        lost = self._lost(outcome, marks)
        ranks = "all ranks are"
        if lost:
            size = self._fitting(self.size - len(lost), marks)
            if size is None:
                _say(
                    f"no restart: {listed(lost)} lost, and with the {self.size - len(lost)} left "
                    f"of {self.size} there is no number of ranks from --min-procs {self._least} on "
                    "that makes up whole replicas"
                )
                return False
            ranks = f"{listed(lost)} lost: {size} of {self.size} ranks are"
            self.size, self._absent = size, set()
        self.number += 1
        _say(f"restart {self.number} of {self._most}: {ranks} started again")
        return True

    def _lost(self, outcome: Outcome, marks: Mapping[int, Layout]) -> list[int]:
        if self._least is None:
            return []
        absent = set(range(self.size)) - set(marks) if marks else set()
        twice, self._absent = absent & self._absent, absent
        return sorted({*outcome.lost, *twice})

    def _fitting(self, most: int, marks: Mapping[int, Layout]) -> int | None:
        """The largest number of ranks that is possible with what the ranks know."""
        layout = next(iter(marks.values()), self._layout)
        for size in range(most, (self._least or 1) - 1, -1):
            if layout is None:
                return size
            try:
                world.replica_size(size, layout.partitions, layout.processes_per_replica)
            except ConfigError:
                continue
            return size
        return None


def known_layout(flags: Mapping[str, Any]) -> Layout | None:
    """The layout that flags say; None if they do not say it."""
    if "partitions" not in flags:
        return None
    return Layout(flags["partitions"], flags.get("processes_per_replica"))


def _say(text: str) -> None:
    print(f"opensmp run: {text}", file=sys.stderr, flush=True)
