"""A model call whose forward and backward passes run in two separate functions.

When a model is called under a tape, the gradients to be requested are not yet known, so only the
forward passes run. Each process saves, for its own partitions, the activations and variable values
that the backward passes read. The backward passes use these values even if a variable has been
assigned since.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Tensor
from opensmp.compiler.lowering.program import Program
from opensmp.compiler.lowering.segments import Segment
from opensmp.compiler.schedule.actions import Action
from opensmp.compiler.trace.differentiable import is_differentiable
from opensmp.compiler.trace.structure import Structure
from opensmp.compiler.trace.trace import TracedGraph
from opensmp.compiler.trace.variables import (
    is_keras,
    is_trainable,
    read_after_assignment,
)
from opensmp.distributed.world import World
from opensmp.execution.autodiff.segment_gradients import FROM_OUTSIDE, Emit, Saved, fails_when_run
from opensmp.execution.emission.pipeline import Pipeline
from opensmp.execution.memory.offload import Offloaded
from opensmp.execution.multi_process.remote_gradient import OwnedBy

Indices = tuple[int, ...]


class _Passes(Pipeline):
    """Base class of both directions: determines the tensors whose gradients are requested."""

    def __init__(
        self, world: World, num_microbatches: int, wants: Callable[[Any], bool] | None
    ) -> None:
        super().__init__(world, num_microbatches, joins=wants is not None)
        self._wants = wants
        self._inputs: set[int] = set()

    def watch(self, inputs: Sequence[Tensor]) -> None:
        """Requests gradients with respect to these inputs of the following calls."""
        self._inputs.update(map(id, inputs))

    def _leaves(
        self, traced: TracedGraph, values: Mapping[int, Tensor], training: Any
    ) -> tuple[list[Tensor], list[Tensor]]:
        if self._wants is None:
            return [], []
        found = [leaf.placeholder for leaf in traced.variables if self._wants(leaf.variable)]
        return found + [p for p in traced.inputs if id(values[id(p)]) in self._inputs], []


class ForwardPasses(_Passes):
    """Runs forward passes and saves the values that the backward passes read.

    Attributes:
        leaves: Maps (microbatch, call number) to the positions of the call's variable values among
            the saved tensors, in the order of the trace's variables.
        calls: Maps a forward action to the positions of its arguments and of its results.
        values: Maps a variable's id to the variable and the position of its value.
        keys: Maps (microbatch, call number) to the key of the trace used for the call.
    """

    def __init__(
        self, world: World, num_microbatches: int, wants: Callable[[Any], bool] | None
    ) -> None:
        super().__init__(world, num_microbatches, wants)
        self._index: dict[tuple[int, int], int] = {}
        self.leaves: dict[tuple[int, int], list[int]] = {}
        self.calls: dict[Action, tuple[Indices, Indices]] = {}
        self.values: dict[int, tuple[Any, int]] = {}
        self.keys: dict[tuple[int, int], tuple[Any, ...]] = {}

    @property
    def saves(self) -> bool:
        """Whether values are saved for backward passes."""
        return self._wants is not None

    @property
    def wanted(self) -> list[Any]:
        """The variables that were read and whose gradients are requested."""
        return [v for v, _ in self._reads.values() if self._wants is not None and self._wants(v)]

    @property
    def own(self) -> list[int]:
        """Positions of the saved tensors that this process owns."""
        mine = self._world.my_partitions
        return [index for index, (_, partition) in enumerate(self._saved) if partition in mine]

    @property
    def saved(self) -> Sequence[tuple[Tensor, int]]:
        """The saved tensors with their partitions."""
        return self._saved

    def offloaded(self, index: int) -> Offloaded | None:
        """The saved tensor at a position, if this process has offloaded it; after `finish`."""
        return self._offloaded.get(id(self._saved[index][0]))

    def kept(self, index: int) -> Tensor:
        """The saved tensor at a position, or what stands for it if it is offloaded."""
        offloaded = self.offloaded(index)
        return self._saved[index][0] if offloaded is None else offloaded.handle

    def _key(self, model: Any, call: Structure, ordinal: int) -> tuple[Any, ...]:
        key = super()._key(model, call, ordinal)
        self.keys[self._microbatch, ordinal] = key
        return key

    def _leaf_values(self, traced: TracedGraph, call: Structure, ordinal: int) -> dict[int, Tensor]:
        values = super()._leaf_values(traced, call, ordinal)
        if self.saves:
            leaves = self.leaves[self._microbatch, ordinal] = []
            for leaf in traced.variables:
                home = self._homes.get(id(leaf.variable), self._world.config.default_partition)
                index = self._save(values[id(leaf.placeholder)], home)
                leaves.append(index)
                if self._state.get(id(leaf.variable)) is None:
                    self.values[id(leaf.variable)] = leaf.variable, index
        return values

    def _call(
        self, program: Program, segment: Segment, action: Action, args: Sequence[Tensor], emit: Emit
    ) -> list[Tensor]:
        forward = program.forward(segment)
        with _private.stop_recording():
            results = emit("F", forward, args)
        if self.saves:
            differentiable = any(program.is_required(t) for t in forward.feeds)
            self.calls[action] = (
                tuple(self._save(t, segment.partition) for t in (args if differentiable else ())),
                tuple(self._save(t, segment.partition) for t in results),
            )
        outputs = results[: len(forward.outputs)]
        if not outputs or not any(map(is_differentiable, args)):
            return outputs

        def gradient(*upstream: Any) -> list[Any]:
            # TensorFlow differentiates an enclosing function before it knows whether the gradient
            # is used.
            return fails_when_run(args, FROM_OUTSIDE, upstream)

        with _private.stop_recording():
            return _private.with_gradient(outputs, args, gradient)

    def _save(self, tensor: Tensor, partition: int) -> int:
        key = id(tensor), self._world.owner(partition)
        if key not in self._index:
            self._index[key] = len(self._saved)
            self._saved.append((tensor, partition))
        return self._index[key]


class BackwardPasses(_Passes):
    """Runs the backward passes of calls whose forward passes have already run.

    The step function is traced again with the same calls in the same order, without emitting their
    forward passes.

    Args:
        world: The process' configuration and devices.
        forward: The traced forward passes.
        saved: The tensors that they saved in this process.
        everywhere: Whether each process gets the gradients of all variables, instead of only those
            of its own variables.
    """

    def __init__(
        self, world: World, forward: ForwardPasses, saved: Sequence[Tensor], everywhere: bool
    ) -> None:
        super().__init__(world, forward.num_microbatches, forward._wants)
        self._forward = forward
        self._traces = forward._traces
        self._given = dict(zip(forward.own, saved, strict=True))
        self._values: dict[int, Tensor] = {}
        self._may_be_empty = True
        self._everywhere = everywhere

    def _key(self, model: Any, call: Structure, ordinal: int) -> tuple[Any, ...]:
        return self._forward.keys[self._microbatch, ordinal]  # attributes may have changed since

    def state_mapping(self) -> list[tuple[Any, Tensor]]:
        """Pairs of a Keras variable and the value that the forward passes read from it."""
        return [
            (variable, self._of_variable(variable, index))
            for variable, index in self._forward.values.values()
            if is_keras(variable)
        ]

    def finish(self, results: Sequence[Tensor]) -> list[Tensor | OwnedBy]:
        """Completes the graph; assigns no state, because the forward function has assigned it."""
        self._state.clear()
        if self._everywhere:
            self._gradients.clear()
        return super().finish(results)

    def _leaf_values(self, traced: TracedGraph, call: Structure, ordinal: int) -> dict[int, Tensor]:
        values = super()._leaf_values(traced, call, ordinal)
        leaves = self._forward.leaves[self._microbatch, ordinal]
        for leaf, index in zip(traced.variables, leaves, strict=True):
            values[id(leaf.placeholder)] = self._of_variable(leaf.variable, index)
        return values

    def _of_variable(self, variable: Any, index: int) -> Tensor:
        value = self._value(index)
        if not is_trainable(variable):
            return value
        read = self._variable_reads.value(variable)
        self._reads[id(variable)] = variable, read
        return read_after_assignment(value, read)

    def _call(
        self, program: Program, segment: Segment, action: Action, args: Sequence[Tensor], emit: Emit
    ) -> list[Tensor]:
        forward = program.forward(segment)
        given, results = (tuple(map(self._value, each)) for each in self._forward.calls[action])
        if not any(program.is_required(t) for t in forward.feeds):
            return list(results[: len(forward.outputs)])
        return self._differentiable(program, segment, args, emit, Saved(given, results))

    def _value(self, index: int) -> Tensor:
        """A saved tensor; a placeholder if another process owns it."""
        if index not in self._values:
            tensor, partition = self._forward.saved[index]
            with _private.stop_recording(), tf.device(self._emitted.device(partition)):
                given, offloaded = self._given.get(index), self._forward.offloaded(index)
                if given is None:
                    given = tf.compat.v1.placeholder(tensor.dtype, tensor.shape)
                if offloaded is None:
                    value = tf.identity(given, name=f"saved_{index}")
                else:
                    value = self._offload.given(offloaded, given, partition)
            value.set_shape(tensor.shape)
            _private.copy_handle_data(tensor, value)
            self._placed[value.op] = partition
            self._values[index] = value
        return self._values[index]
