"""The passes of a segment: functions that a schedule calls, with their arguments and results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opensmp.base.types import ConcreteFunction, Tensor
from opensmp.compiler.lowering.finite_flags import Activation
from opensmp.compiler.lowering.gradients import SegmentGradient


@dataclass(frozen=True, eq=False)
class Forward:
    """The forward pass of a segment.

    Attributes:
        function: Takes `feeds`; returns `returned`, then finite flags if there are `activations`,
            then, for a segment with side effects, a zero that the caller must read.
        feeds: Inputs and variables of the segment.
        outputs: The segment's outputs.
        residuals: Further tensors to keep for the backward pass.
        activations: Tensors that the flags describe; empty unless checks were requested.
        returned: The outputs, then the residuals, and among these what the backward pass computes
            again. So the function is the same with and without recomputation: TensorFlow fuses
            operations whose results nothing reads, and fused operations round differently. What is
            not kept is freed when the call ends, since nothing reads it.
    """

    function: ConcreteFunction
    feeds: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    residuals: tuple[Tensor, ...]
    activations: tuple[Activation, ...] = ()
    returned: tuple[Tensor, ...] = ()

    def kept(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Returns the results of the function in the order `outputs`, `residuals`, others."""
        position = {id(t): i for i, t in enumerate(self.returned)}
        kept = [results[position[id(t)]] for t in (*self.outputs, *self.residuals)]
        return [*kept, *results[len(self.returned) :]]


@dataclass(frozen=True, eq=False)
class RecomputePass:
    """What runs before a backward pass to compute what the forward pass has not kept.

    It is a call of its own, so that TensorFlow optimizes the backward pass as without it.

    Attributes:
        function: Takes `feeds` and returns `fetches`.
        feeds: The segment's inputs, variables and kept tensors that it reads.
        fetches: Tensors of the forward pass.
    """

    function: ConcreteFunction
    feeds: tuple[Tensor, ...]
    fetches: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Backward:
    """A backward pass of a segment, or one half of a split one.

    Attributes:
        function: Takes `feeds`; returns the tensors of `gradient.flat`, then `handed`, then finite
            flags if there are tensors in `looked_at`.
        feeds: The segment's inputs, variables, outputs, residuals and upstream gradients that the
            function reads; for a second half also tensors that the first half `handed` on.
        gradient: The gradients that it computes.
        handed: Tensors that it passes to `weights`.
        weights: The second half, which computes the gradients of the variables; None if this pass
            computes all gradients.
        looked_at: Tensors that the flags describe: upstream gradients from the loss, and gradients;
            empty unless checks were requested.
        recompute: Runs before, and computes tensors that this pass and `weights` read; None if the
            forward pass has kept all of them.
    """

    function: ConcreteFunction
    feeds: tuple[Tensor, ...]
    gradient: SegmentGradient
    handed: tuple[Tensor, ...] = ()
    weights: Backward | None = None
    looked_at: tuple[Tensor, ...] = ()
    recompute: RecomputePass | None = None


Pass = Forward | Backward
