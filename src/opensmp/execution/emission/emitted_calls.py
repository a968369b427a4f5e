"""The calls of a step, as they were emitted: what runs where, under which action."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from opensmp.compiler.schedule.actions import Action
from opensmp.distributed.watchdog.root_cause import is_careful
from opensmp.distributed.world import World
from opensmp.execution.emission.emit_call import emit_call
from opensmp.execution.emission.task_graph import Task
from opensmp.execution.emission.weight_gradient_batching import SecondHalf
from opensmp.execution.profiling.timestamps import Stamps

Tensor = Any


class EmittedCalls:
    """The calls that were emitted into the graph of a step.

    Args:
        world: The process' configuration and devices.
        num_microbatches: Number of microbatches.
        stamps: Notes when calls start and end; None leaves that out.

    Attributes:
        tasks: Action to the call that does it.
    """

    def __init__(self, world: World, num_microbatches: int, stamps: Stamps | None) -> None:
        self._world = world
        self._num_microbatches = num_microbatches
        self._stamps = stamps
        self.tasks: dict[Action, Task] = {}

    @property
    def is_ordered(self) -> bool:
        """Whether calls are to be ordered or timed; else TensorFlow may optimise across them."""
        num_partitions = len(self._world.devices)
        return num_partitions > 1 or self._num_microbatches > 1 or self._stamps is not None

    def device(self, partition: int) -> str:
        """Where the calls of a partition run; all in one place if the cause of an error is sought.

        Between devices, errors of those that wait may be reported before their cause.
        """
        return self._world.devices[0 if is_careful() else partition]

    def is_open(self, action: Action) -> bool:
        """Whether what a call gives is handed on while the call still computes.

        With the last microbatch the sum of a gradient is complete, and on its way to the other
        replicas while those of the layers before are computed.
        """
        is_last = action.kind in ("B", "W") and action.microbatch == self._num_microbatches - 1
        return is_last and self._world.sums_early and self._stamps is None

    def action(self, kind: str, number: int, microbatch: int) -> Action:
        """One that no emitted call does yet.

        Args:
            kind: Of the pass.
            number: Of the segment's call in a microbatch.
            microbatch: The microbatch.
        """
        repeat = 0
        while (action := Action(kind, number, microbatch, repeat)) in self.tasks:
            repeat += 1
        return action

    def emit(
        self,
        action: Action,
        partition: int,
        function: Any,
        args: Sequence[Tensor],
        microbatches: tuple[int, ...] = (),
    ) -> list[Tensor]:
        """Emits a call.

        Args:
            action: What it does.
            partition: Where it runs.
            function: The function to call.
            args: Its arguments.
            microbatches: See `Task`.

        Returns:
            Its results.
        """
        with tf.device(self.device(partition)):
            one_thread = self._world.one_core_each and not self.is_open(action)
            one_thread = one_thread or is_careful()
            emit = functools.partial(emit_call, function, args, f"smp_{action.text}", one_thread)
            if self._stamps is None:
                call, results = emit()
                first = last = call
            else:
                first, call, last, results = self._stamps.around(action, args, emit)
        ops = tuple(dict.fromkeys((first, call, last, *(t.op for t in results))))
        self.tasks[action] = Task(action, partition, first, last, ops, microbatches)
        return results

    def emit_joined(self, group: Sequence[SecondHalf]) -> list[Tensor]:
        """Emits the second halves of a group as one call, and forgets the single ones.

        Args:
            group: They, by microbatch.

        Returns:
            The results of the call.
        """
        first, last = group[0], group[-1]
        columns = list(zip(*(half.args for half in group), strict=True))
        is_shared = [all(t is column[0] for t in column) for column in columns]
        is_open = self.is_open(last.action)
        function = first.program.joint(first.weights, is_shared, len(group), is_open)
        args = [
            t
            for column, shared in zip(columns, is_shared, strict=True)
            for t in (column[:1] if shared else column)
        ]
        partition = self.tasks[last.action].partition
        for half in group:
            del self.tasks[half.action]
        microbatches = tuple(half.action.microbatch for half in group)
        return self.emit(last.action, partition, function, args, microbatches)
