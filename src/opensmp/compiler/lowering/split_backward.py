"""Splits a backward pass into the gradients that other segments wait for and the remaining ones."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from opensmp.base.types import Op, Tensor
from opensmp.compiler.lowering.extraction import needed
from opensmp.compiler.lowering.gradients import SegmentGradient
from opensmp.compiler.lowering.matmul_gradients import product_of
from opensmp.compiler.lowering.segments import Segment


@dataclass(frozen=True, eq=False)
class SplitGradient:
    """The two halves of a segment's backward pass.

    Attributes:
        first: The gradients of the segment's inputs, which earlier segments wait for.
        second: The gradients of its variables, which are needed only at the end of the step.
        handed: Tensors that the first half passes to the second.
    """

    first: SegmentGradient
    second: SegmentGradient
    handed: tuple[Tensor, ...]


def split(
    segment: Segment,
    gradient: SegmentGradient,
    feeds: Sequence[Tensor],
    captured: Collection[int],
    take_products_apart: bool = False,
) -> SplitGradient | None:
    """Splits a backward pass between the gradients of inputs and those of variables.

    This is the idea of zero-bubble pipelines (Qi et al., "Zero Bubble Pipeline Parallelism", 2024).
    The first half computes the tensors that both halves need and passes them on, except those that
    depend on weights and constants alone, which each half computes itself. With
    `take_products_apart`, a pass without gradients of inputs is split, too, into variable gradients
    that are products worth joining over microbatches, and all others.

    Returns None if there is nothing to split: no gradient of an input, no gradient of a variable,
    or only variable gradients that are by-products of the input gradients.
    """
    inputs = {id(t) for t in segment.inputs}
    first = _part(gradient, [id(t) in inputs for t in gradient.wrt])
    second = _part(gradient, [id(t) not in inputs for t in gradient.wrt])
    stop = {id(t) for t in feeds} | set(captured)
    weights = {id(t) for t in segment.variables} | set(captured)
    moving = _moving(gradient, feeds, weights, stop)
    if not first.flat and take_products_apart:
        return _products_apart(gradient, stop, moving)
    if not first.flat or not second.flat:
        return None
    before = set(_operations(first, stop))
    late = [op for op in _operations(second, stop) if op in moving and op not in before]
    if not late:
        return None
    read = [t for op in late for t in op.inputs]
    read += [t for t in second.flat if t.op in before]
    handed = {id(t): t for t in read if t.op in before and t.op in moving and id(t) not in stop}
    return SplitGradient(first, second, tuple(handed.values()))


def _products_apart(
    gradient: SegmentGradient, stop: Collection[int], moving: Collection[Op]
) -> SplitGradient | None:
    """Splits off the gradients that are products worth joining; None if that is impossible."""
    found = [None if t is None else product_of(t, stop) for t in gradient.gradients]
    chosen = [product is not None and product.is_worth_joining for product in found]
    products = [p for p, is_chosen in zip(found, chosen, strict=True) if p and is_chosen]
    if not products:
        return None
    late = {op for product in products for op in product.operations}
    first = _part(gradient, [not c for c in chosen])
    second = _part(gradient, chosen)
    others = (t for op in _operations(gradient, stop) if op not in late for t in op.inputs)
    if any(t.op in late for t in (*others, *first.flat)):
        return None  # another gradient depends on a product
    read = [t for product in products for op in product.operations for t in op.inputs]
    handed = {id(t): t for t in read if t.op in moving and t.op not in late and id(t) not in stop}
    return SplitGradient(first, second, tuple(handed.values()))


def _part(gradient: SegmentGradient, chosen: Sequence[bool]) -> SegmentGradient:
    leaves = zip(gradient.wrt, gradient.gradients, strict=True)
    pairs = [pair for pair, mine in zip(leaves, chosen, strict=True) if mine]
    return SegmentGradient(
        gradient.outputs,
        gradient.upstream,
        tuple(leaf for leaf, _ in pairs),
        tuple(value for _, value in pairs),
    )


def _operations(gradient: SegmentGradient, stop: Collection[int]) -> list[Op]:
    return needed([t.op for t in gradient.flat if id(t) not in stop], stop, lambda op: False)


def _moving(
    gradient: SegmentGradient,
    feeds: Sequence[Tensor],
    weights: Collection[int],
    stop: Collection[int],
) -> set[Op]:
    """Returns the backward operations that depend on more than weights and constants."""
    other = {id(t) for t in feeds if id(t) not in weights}
    moving: set[Op] = set()
    for op in _operations(gradient, stop):
        if any(id(t) in other or (t.op in moving and id(t) not in stop) for t in op.inputs):
            moving.add(op)
    return moving
