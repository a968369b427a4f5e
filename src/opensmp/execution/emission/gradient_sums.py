"""Emits calls that compute sums of weight gradients over microbatches.

With one addition per weight and microbatch beside the calls, most of a step's operations would be
additions, and gradients would wait in memory for theirs. Instead, the call of a pass adds its
gradients to the sums of the microbatches before, or one call replaces those of several microbatches
(see `weight_gradient_batching`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from opensmp import _private
from opensmp.base.types import ConcreteFunction, Gradient, Tensor
from opensmp.compiler.lowering.gradients import components
from opensmp.compiler.lowering.passes import Backward
from opensmp.compiler.lowering.program import Program
from opensmp.compiler.schedule.actions import Action
from opensmp.distributed.watchdog.root_cause import note
from opensmp.execution.emission.emit_call import emit_call
from opensmp.execution.emission.emitted_calls import EmittedCalls
from opensmp.execution.emission.finite_checks import FiniteChecks
from opensmp.execution.emission.weight_gradient_batching import (
    JointWeightGradient,
    Sums,
    WeightGradientPass,
    is_dense,
    joinable,
    keys,
    summable,
)

# Operations whose results TensorFlow's graph optimizer does not combine with an addition.
_NO_SUMS = frozenset(
    (
        "BatchMatMul",
        "BatchMatMulV2",
        "BiasAddGrad",
        "Conv2DBackpropFilter",
        "Conv3DBackpropFilterV2",
        "DepthwiseConv2dNativeBackpropFilter",
        "Einsum",
        "FusedBatchNormGradV3",
        "MatMul",
        "Reshape",
        "Sum",
        "Transpose",
    )
)


@dataclass(frozen=True, eq=False)
class RunningSum:
    """Passes whose calls form a chain, each of which adds to the sums of the one before.

    Attributes:
        run: The passes, of microbatches 0, 1, ...
        gradients: For each pass the gradients that its call returns: sums over the microbatches so
            far, and for sparse gradients those of its microbatch.
    """

    run: tuple[WeightGradientPass, ...]
    gradients: tuple[tuple[Gradient | None, ...], ...]

    @property
    def instead(self) -> dict[int, list[Gradient]]:
        """The terms that replace the gradients of each pass, by the ids of `keys`."""
        found: dict[int, list[Gradient]] = {}
        for half, gradients in zip(self.run, self.gradients, strict=True):
            present = [gradient for gradient in gradients if gradient is not None]
            for key, gradient in zip(keys(half), present, strict=True):
                is_term = not is_dense(gradient) or half is self.run[-1]
                found[key] = [gradient] if is_term else []
        return found


def _dense_positions(weights: Backward) -> list[int]:
    """Positions of the dense gradients among the results of a pass."""
    positions, position = [], 0
    for gradient in weights.gradient.gradients:
        if is_dense(gradient):
            positions.append(position)
        position += len(components(gradient))
    return positions


class _AddingPasses:
    """The functions of passes that add to sums; each is compiled once."""

    def __init__(self) -> None:
        self._made: dict[tuple[Backward, bool, bool], ConcreteFunction] = {}

    def function(
        self, program: Program, weights: Backward, is_open: bool, one_thread: bool
    ) -> ConcreteFunction:
        """Takes the arguments of a pass, then a sum for each dense gradient; returns its results.

        The dense gradients among the results are added to the sums. If a gradient is a sum itself,
        the pass stays a function of its own, so that TensorFlow cannot change the order of the
        additions; a call less takes less time otherwise.
        """
        key = weights, is_open, one_thread
        if key not in self._made:
            positions = _dense_positions(weights)
            gradients = [weights.gradient.flat[i] for i in positions]
            is_apart = not all(gradient.op.type in _NO_SUMS for gradient in gradients)
            inner = program.open(weights) if is_open or not is_apart else weights.function
            specs = [*weights.feeds, *gradients]

            def body(*args: Tensor) -> list[Tensor]:
                for spec, arg in zip(specs, args, strict=True):
                    _private.copy_handle_data(spec, arg)
                count = len(weights.feeds)
                _, results = emit_call(inner, args[:count], "single", one_thread)
                for position, total in zip(positions, args[count:], strict=True):
                    results[position] = total + results[position]
                return results

            is_pure = not any(map(_private.is_stateful, inner.graph.get_operations()))
            self._made[key] = program.extractor.compiled(
                "adding", body, specs, is_open, is_pure=is_pure
            )
        return self._made[key]


class GradientSums:
    """Lets the calls of one step compute sums."""

    def __init__(
        self,
        emitted: EmittedCalls,
        checks: FiniteChecks | None,
        note_gradient: Callable[[Tensor, Gradient], None],
    ) -> None:
        self._emitted, self._checks, self._note_gradient = emitted, checks, note_gradient
        self._adding = _AddingPasses()

    def replace(
        self, passes: Mapping[Action, WeightGradientPass], sums: Sums, size: int
    ) -> list[list[Gradient] | None]:
        """Replaces the calls of passes; returns the new terms of each sum, see `Sums.terms`."""
        rest = dict(passes)
        instead: dict[int, list[Gradient]] = {}
        for group in joinable(passes, sums, size):
            for half in group:
                del rest[half.action]
            instead |= self._join(group).instead
        for run in summable(rest, sums):
            instead |= self._add_up(run).instead
        return sums.terms(instead)

    def _join(self, group: Sequence[WeightGradientPass]) -> JointWeightGradient:
        """Emits one call in place of those of a group."""
        first, last = group[0], group[-1]
        results = self._emitted.emit_joined(group)
        gradients = first.weights.gradient.pack(results)
        for feed, gradient in zip(first.weights.gradient.wrt, gradients, strict=True):
            if gradient is not None:
                self._note_gradient(feed, gradient)
        if self._checks is not None:
            microbatches = tuple(half.action.microbatch for half in group)
            self._checks.join(last.action, first.program, first.weights, results, microbatches)
        return JointWeightGradient(tuple(group), tuple(gradients))

    def _add_up(self, run: Sequence[WeightGradientPass]) -> RunningSum:
        """Lets each pass but the first add its gradients to those of the passes before."""
        weights, results = run[0].weights, list(run[0].results)
        positions = _dense_positions(weights)
        gradients = [weights.gradient.pack(results)]
        for half in run[1:]:
            totals = [results[position] for position in positions]
            results = self._emit_adding(half, totals)
            note(self._emitted.tasks[half.action].last.name, half.place)
            if self._checks is not None:
                self._checks.note(half.action, half.program, weights, results)
            gradients.append(weights.gradient.pack(results))
            for feed, gradient in zip(weights.gradient.wrt, gradients[-1], strict=True):
                if gradient is not None and (half is run[-1] or not is_dense(gradient)):
                    self._note_gradient(feed, gradient)
        return RunningSum(tuple(run), tuple(map(tuple, gradients)))

    def _emit_adding(self, half: WeightGradientPass, totals: Sequence[Tensor]) -> list[Tensor]:
        action = half.action
        is_open = self._emitted.is_open(action)
        one_thread = self._emitted.in_one_thread(action, half.weights.function)
        function = self._adding.function(half.program, half.weights, is_open, one_thread)
        return self._emitted.emit_again(action, function, [*half.args, *totals])
