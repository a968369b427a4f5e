"""Save interval in steps, with the semantics of `tf.train.CheckpointManager`."""

from __future__ import annotations

from typing import Any


class Interval:
    """Decides which calls of `save` write a checkpoint.

    Args:
        steps: Minimum number of steps between two checkpoints; None if every call writes one.
        counter: The step counter: a variable, or anything that `int` accepts.
        last: Step of the last checkpoint; None if there is none.
    """

    def __init__(self, steps: int | None, counter: Any, last: int | None) -> None:
        self.steps = steps
        self.last = None if last is None else int(last)
        self._counter = counter

    def now(self) -> int | None:
        """The current step; None if every call writes a checkpoint."""
        if self.steps is None:
            return None
        value = self._counter
        return int(value.numpy() if hasattr(value, "numpy") else value)

    def is_due(self, step: int | None, check: bool) -> bool:
        """Whether to write a checkpoint; without `check` only a repeated step is skipped."""
        if self.steps is None or step is None or self.last is None:
            return True
        return step != self.last and not (check and step < self.last + self.steps)
