"""Saving every so many steps, as `tf.train.CheckpointManager` does it."""

from __future__ import annotations

from typing import Any


class Interval:
    """Which calls of `save` write a checkpoint.

    Args:
        steps: The least number of steps between two checkpoints, None if each call writes one.
        counter: A variable, or anything else that `int` takes, with the number of the step.
        last: The step of the last checkpoint, None if there was none.
    """

    def __init__(self, steps: int | None, counter: Any, last: int | None) -> None:
        self.steps = steps
        self.last = None if last is None else int(last)
        self._counter = counter

    def now(self) -> int | None:
        """The step, None if each call writes a checkpoint."""
        if self.steps is None:
            return None
        value = self._counter
        return int(value.numpy() if hasattr(value, "numpy") else value)

    def is_due(self, step: int | None, check: bool) -> bool:
        """Whether to write a checkpoint at a step.

        Args:
            step: The step.
            check: Whether the interval counts. Otherwise one is due unless this step has one.
        """
        if self.steps is None or step is None or self.last is None:
            return True
        return step != self.last and not (check and step < self.last + self.steps)
