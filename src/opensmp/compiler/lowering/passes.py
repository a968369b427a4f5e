"""The passes of a segment: the functions that a schedule calls, and what they take and give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opensmp.compiler.lowering.finite_flags import Activation
from opensmp.compiler.lowering.gradients import SegmentGradient

Tensor = Any
ConcreteFunction = Any


@dataclass(frozen=True, eq=False)
class Forward:
    """The forward pass of a segment.

    Attributes:
        function: Takes `feeds`, returns `outputs` and then `residuals`; if there are
            `activations`, flags of whether each of them is finite; for a segment with
            side effects also a zero, which somebody must read.
        feeds: Inputs and variables of the segment.
        outputs: The segment's outputs.
        residuals: What the backward pass wants to have kept.
        activations: What is looked at; empty unless that was asked for.
    """

    function: ConcreteFunction
    feeds: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    residuals: tuple[Tensor, ...]
    activations: tuple[Activation, ...] = ()


@dataclass(frozen=True, eq=False)
class Backward:
    """A backward pass of a segment, or one of the two halves of a split one.

    Attributes:
        function: Takes `feeds`, returns the tensors of `gradient.flat` and then `handed`.
        feeds: Those of the segment's inputs, variables, outputs, residuals and
            upstream gradients that the function reads; in the second half also what the first
            one has `handed` on.
        gradient: What it computes.
        handed: What `weights` wants to have from it.
        weights: The second half, the gradients of the variables; None if all are computed here.
    """

    function: ConcreteFunction
    feeds: tuple[Tensor, ...]
    gradient: SegmentGradient
    handed: tuple[Tensor, ...] = ()
    weights: Backward | None = None


Pass = Forward | Backward
