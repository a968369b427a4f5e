"""The calls emitted for a step: their partitions, operations and actions."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from opensmp.base.types import ConcreteFunction, Op, Tensor
from opensmp.compiler.schedule.actions import Action
from opensmp.distributed.watchdog.root_cause import is_careful
from opensmp.distributed.world import World
from opensmp.execution.emission.emit_call import emit_call, nested_calls
from opensmp.execution.emission.task_graph import Task
from opensmp.execution.emission.weight_gradient_batching import WeightGradientPass
from opensmp.execution.profiling.timestamps import Stamps


class EmittedCalls:
    """The calls emitted into a step's graph."""

    def __init__(self, world: World, num_microbatches: int, stamps: Stamps | None) -> None:
        self._world = world
        self._num_microbatches = num_microbatches
        self._stamps = stamps
        self.tasks: dict[Action, Task] = {}
        self._before: dict[Action, tuple[Op, Tensor | None]] = {}

    @property
    def is_ordered(self) -> bool:
        """Whether calls must be ordered or timed; if not, TensorFlow may optimise across them."""
        num_partitions = len(self._world.devices)
        return num_partitions > 1 or self._num_microbatches > 1 or self._stamps is not None

    def device(self, partition: int) -> str:
        """Device of a partition; the first device for all while an error's cause is sought.

        With several devices, operations that wait may report errors before the operation that
        caused them.
        """
        return self._world.devices[0 if is_careful() else partition]

    def is_open(self, action: Action) -> bool:
        """Whether a call's results become available while the call is still computing.

        The last microbatch completes the sum of each gradient, so that its all-reduce over the
        replicas can overlap the computation of the gradients of earlier layers.
        """
        is_last = action.kind in ("B", "W") and action.microbatch == self._num_microbatches - 1
        return is_last and self._world.sums_early and self._stamps is None

    def action(self, kind: str, number: int, microbatch: int) -> Action:
        """The action with the lowest repeat number that no emitted call performs yet.

        `number` is that of the segment's call within a microbatch.
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
        """Emits a call on the partition's device and records it as the task of `action`."""
        with tf.device(self.device(partition)):
            one_thread = self.in_one_thread(action, function)
            emit = functools.partial(emit_call, function, args, f"smp_{action.text}", one_thread)
            before, start = self._before.get(action, (None, None))
            if self._stamps is None:
                call, results = emit()
                first, last = before or call, call
            else:
                first, call, last, results = self._stamps.around(action, args, emit, start)
        calls = (first, call, last) if before is None else (first, before, call, last)
        ops = tuple(dict.fromkeys((*calls, *(t.op for t in results))))
        self.tasks[action] = Task(action, partition, first, last, ops, microbatches)
        return results

    def in_one_thread(self, action: Action, function: ConcreteFunction) -> bool:
        """Whether a call runs in a single thread, see `emit_call`.

        Not if that thread could wait forever for a function that the called one calls.
        """
        is_wanted = (self._world.one_core_each and not self.is_open(action)) or is_careful()
        return is_wanted and nested_calls(function) <= self._world.nested_calls

    def emit_before(
        self, action: Action, partition: int, function: Any, args: Sequence[Tensor]
    ) -> list[Tensor]:
        """Emits a call that becomes the first part of the task of `action`, which is emitted next.

        Returns its results. It does not wait for arguments that only the task's own call reads.
        """
        with tf.device(self.device(partition)):
            stamp = None if self._stamps is None else self._stamps.start(args)
            with tf.control_dependencies([] if stamp is None else [stamp]):
                one_thread = self.in_one_thread(action, function)
                call, results = emit_call(function, args, f"smp_A_{action.text}", one_thread)
        self._before[action] = call, stamp
        return results

    def emit_again(self, action: Action, function: Any, args: Sequence[Tensor]) -> list[Tensor]:
        """Emits a call that replaces that of the task of `action`, and returns its results."""
        return self.emit(action, self.tasks.pop(action).partition, function, args)

    def emit_joined(self, group: Sequence[WeightGradientPass]) -> list[Tensor]:
        """Emits a group's weight-gradient passes as one call and returns its results.

        `group` is sorted by microbatch. The joint call replaces the tasks of the single passes.
        """
        first, last = group[0], group[-1]
        columns = list(zip(*(half.args for half in group), strict=True))
        is_shared = [all(t is column[0] for t in column) for column in columns]
        is_open = self.is_open(last.action)
        function = first.program.fused_weight_gradients(
            first.weights, is_shared, len(group), is_open
        )
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
