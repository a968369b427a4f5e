"""The program: for each segment, the functions that a schedule calls."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import tensorflow as tf

from opensmp import _private
from opensmp.base.types import ConcreteFunction, Gradient, Op, Tensor
from opensmp.compiler.lowering.extraction import Extractor, needed
from opensmp.compiler.lowering.finite_cover import tensors_to_read
from opensmp.compiler.lowering.finite_flags import activations, is_checked
from opensmp.compiler.lowering.gradients import (
    SegmentGradient,
    active_operations,
    differentiate,
    reached_from,
    repeated,
    residuals,
)
from opensmp.compiler.lowering.passes import Backward, Forward, RecomputePass
from opensmp.compiler.lowering.segments import Segment, cut
from opensmp.compiler.lowering.split_backward import split
from opensmp.compiler.lowering.weight_gradient_fusion import fuse_weight_gradients, is_worth_joining
from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.recomputation.choice import Recomputation, has_state
from opensmp.compiler.recomputation.policy import Policy
from opensmp.compiler.trace.differentiable import is_differentiable, is_differentiable_number
from opensmp.compiler.trace.intermediate_outputs import taps
from opensmp.compiler.trace.layer_calls import operation_labels
from opensmp.compiler.trace.trace import TracedGraph
from opensmp.errors import StepError


class Program:
    """A planned model lowered to functions.

    Args:
        traced: The traced model.
        plan: Its plan.
        required: Inputs and variables (their placeholders) whose gradients the backward pass
            computes; residuals are kept for these only.
        optional: Inputs and variables whose gradients may be requested later; such a gradient runs
            the segment's forward pass again.
        units: Whether the functions are not inlined, so that their calls can be ordered and timed.
        split_backward: Whether to split a backward pass into one function for the gradients of the
            segment's inputs, which other segments wait for, and one for those of its variables.
        joins: Whether second halves of several microbatches may be joined, see
            `fused_weight_gradients`. Then a segment without input gradients is split as well.
        checks_finite: Whether forward passes also return which activations are finite.
        recompute: Which operations backward passes run again, instead of keeping their results.
    """

    def __init__(
        self,
        traced: TracedGraph,
        plan: Plan,
        required: Collection[Tensor] = (),
        optional: Collection[Tensor] = (),
        units: bool = True,
        split_backward: bool = False,
        joins: bool = False,
        checks_finite: bool = False,
        recompute: Policy | None = None,
    ) -> None:
        self.traced = traced
        self.plan = plan
        self.segments = cut(traced, plan)
        self.taps = taps(traced)
        self._recomputation = Recomputation(traced, plan, recompute) if recompute else None
        self._required = reached_from(traced, required)
        self._optional = reached_from(traced, optional)
        # A call that TensorFlow inlines would share the forward operations with the forward pass.
        self._extractor = Extractor(traced.graph, traced.captures, units or bool(recompute))
        self._split_backward = split_backward
        self._joins = joins
        self._checks_finite = checks_finite
        self._read: dict[int, tuple[Tensor, ...]] = {}  # by backward passes, kept or not
        self._held: dict[int, tuple[Tensor, ...]] = {}
        self._fused: dict[tuple[Backward, tuple[bool, ...], int, bool], ConcreteFunction] = {}
        self._layers: dict[int, tuple[str, ...]] = {}
        self._open: dict[Backward, ConcreteFunction] = {}
        self._captured = frozenset(id(inner) for _, inner in traced.captures)
        self._backward: dict[tuple[int, frozenset[int]], Backward | None] = {}
        self._recompute: dict[tuple[int, frozenset[int]], Backward] = {}
        self._derivatives: dict[tuple[int, tuple[int, ...], tuple[int, ...]], Backward | None] = {}
        gradients = {s.index: self._differentiate(s, s.outputs) for s in self.segments}
        self._forward = {s.index: self._build_forward(s, gradients[s.index]) for s in self.segments}
        for segment in self.segments:
            self._build_backward(segment, gradients[segment.index])

    def __str__(self) -> str:
        lines = [str(self.plan), *(f"  {segment}" for segment in self.segments)]
        return "\n".join(lines)

    def is_required(self, tensor: Tensor) -> bool:
        """Returns whether the gradient of a tensor flows on to a required leaf."""
        return tensor.op in self._required and is_differentiable(tensor)

    def is_optional(self, tensor: Tensor) -> bool:
        """Returns whether the gradient of a tensor flows on to optional leaves only."""
        return (
            not self.is_required(tensor)
            and tensor.op in self._optional
            and is_differentiable(tensor)
        )

    def forward(self, segment: Segment) -> Forward:
        """Returns the forward pass of a segment."""
        return self._forward[segment.index]

    def backward(self, segment: Segment, connected: Sequence[Tensor]) -> Backward | None:
        """Returns the backward pass for `connected`, the segment outputs that have a gradient.

        The result is None if no required gradient depends on these outputs.
        """
        chosen = [t for t in connected if self.is_required(t)]
        key = (segment.index, frozenset(id(t) for t in chosen))
        if key not in self._backward:
            self._build_backward(segment, self._differentiate(segment, chosen))
        return self._backward[key]

    def recompute(self, segment: Segment, connected: Sequence[Tensor]) -> Backward:
        """Returns a backward pass for the optional gradients that runs the forward pass again."""
        key = (segment.index, frozenset(id(t) for t in connected))
        if key not in self._recompute:
            wrt = [t for t in (*segment.inputs, *segment.variables) if self.is_optional(t)]
            gradient = differentiate(self.traced, segment, connected, wrt)
            feeds = (*segment.inputs, *segment.variables, *gradient.upstream)
            self._refuse_second_draw(segment, gradient, feeds)
            self._recompute[key] = self._extract("R", segment, gradient, feeds)
        return self._recompute[key]

    def derivative(
        self, segment: Segment, outputs: Sequence[Tensor], feeds: Sequence[Tensor]
    ) -> Backward | None:
        """Returns a backward pass that can be differentiated again, with dense gradients.

        It computes the gradients of `outputs`, or of gradients that such a pass returns, from
        `feeds` alone, which then include the upstream gradients. The result is None if no feed has
        a gradient.
        """
        key = (segment.index, tuple(map(id, outputs)), tuple(map(id, feeds)))
        if key not in self._derivatives:
            wrt = [t for t in feeds if is_differentiable_number(t)]
            gradient = differentiate(self.traced, segment, outputs, wrt, feeds, dense=True)
            everything = (*feeds, *gradient.upstream)
            self._refuse_second_draw(segment, gradient, everything)
            found = self._extract("R", segment, gradient, everything) if gradient.flat else None
            self._derivatives[key] = found
        return self._derivatives[key]

    def layers(self, segment: Segment) -> tuple[str, ...]:
        """Returns the names of the innermost layers of a segment's operations, in order."""
        if segment.index not in self._layers:
            spans = sorted(self.traced.spans, key=lambda span: span.depth)
            of: dict[int, str] = {}
            for span in spans:  # inner layers override outer ones
                of.update(dict.fromkeys(range(span.start, span.stop), span.layer.name))
            number = {op: i for i, op in enumerate(self.traced.graph.get_operations())}
            names = (of.get(number[op]) for op in segment.operations)
            self._layers[segment.index] = tuple(dict.fromkeys(filter(None, names)))
        return self._layers[segment.index]

    @property
    def layer_labels(self) -> tuple[str, ...]:
        """Labels of all layer calls of the model, see `opensmp.compiler.trace.layer_calls`."""
        return operation_labels(self.traced)[0]

    def open(self, backward: Backward) -> ConcreteFunction:
        """Returns a variant of a backward pass or half that yields each result once it is computed.

        TensorFlow inlines its calls into the caller's graph; a call that is not inlined yields all
        its results when it ends.
        """
        if backward not in self._open:
            self._open[backward] = _private.variant_of(backward.function, {})
        return self._open[backward]

    @property
    def extractor(self) -> Extractor:
        """Compiles the functions of this program."""
        return self._extractor

    def is_worth_joining(self, weights: Backward) -> bool:
        """Returns whether joining the second halves of several microbatches saves time."""
        # Joined passes that recompute would hold what they computed for all microbatches at once.
        is_alone = weights.recompute is not None
        return self._joins and not is_alone and is_worth_joining(weights, self._captured)

    def fused_weight_gradients(
        self,
        weights: Backward,
        is_shared: Sequence[bool],
        num_microbatches: int,
        is_open: bool = False,
    ) -> ConcreteFunction:
        """Returns a function that computes the summed second halves of several microbatches.

        The function takes the value of each shared feed and `num_microbatches` values of each other
        feed, and returns the tensors of `weights.gradient.flat`; sparse gradients are concatenated.
        """
        key = (weights, tuple(is_shared), num_microbatches, is_open)
        if key not in self._fused:
            self._fused[key] = fuse_weight_gradients(
                self._extractor, weights, is_shared, num_microbatches, self._captured, is_open
            )
        return self._fused[key]

    def _differentiate(self, segment: Segment, outputs: Sequence[Tensor]) -> SegmentGradient:
        chosen = [t for t in outputs if self.is_required(t)]
        wrt = [t for t in (*segment.inputs, *segment.variables) if self.is_required(t)]
        return differentiate(self.traced, segment, chosen, wrt)

    def _build_forward(self, segment: Segment, gradient: SegmentGradient) -> Forward:
        """Extracts the forward pass, with the residuals for `gradient` as further outputs."""
        made = {id(t) for t in segment.outputs}
        read = residuals(self.traced, segment, gradient)
        kept = self._kept(segment, gradient, read)
        self._read[segment.index], self._held[segment.index] = read, kept
        returned = tuple({id(t): t for t in (*segment.outputs, *read, *kept)}.values())
        feeds = (*segment.inputs, *segment.variables)
        found = activations(self.traced, segment) if self._checks_finite else ()
        function = self._extractor.function(
            f"F{segment.index}",
            feeds,
            returned,
            must_run=segment.side_effects,
            control=frozenset(segment.operations),
            looked_at=[each.tensor for each in found],
            returns_all=self._recomputes(segment),
        )
        extra = tuple(t for t in kept if id(t) not in made)
        return Forward(function, feeds, segment.outputs, extra, found, returned)

    def _recomputes(self, segment: Segment) -> bool:
        """Returns whether the backward pass may run some of a segment's operations again."""
        found = self._recomputation
        return found is not None and found.is_any(segment.operations)

    def _kept(
        self, segment: Segment, gradient: SegmentGradient, read: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """Returns what a forward pass keeps, of or for what the backward pass reads."""
        if self._recomputation is None or not self._recomputes(segment):
            return read
        forward = set(segment.operations)
        active = active_operations(self.traced, segment) & forward
        small = [t for t in read if t.op not in forward]  # shapes, computed for the gradients
        again = repeated(segment, gradient)
        kept = self._recomputation.kept([t for t in read if t.op in forward], active, again)
        return (*kept, *small)

    def _build_backward(self, segment: Segment, gradient: SegmentGradient) -> None:
        """Extracts and caches the backward pass for a gradient, split in two if configured."""
        key = (segment.index, frozenset(id(t) for t in gradient.outputs))
        if not gradient.flat:
            self._backward[key] = None
            return
        forward = self._forward[segment.index]
        again = repeated(segment, gradient)
        outputs = (t for t in forward.outputs if t.op not in again)
        feeds = (*forward.feeds, *outputs, *self._read[segment.index], *gradient.upstream)
        feeds = tuple({id(t): t for t in feeds}.values())
        halves = None
        if self._split_backward:
            halves = split(segment, gradient, feeds, self._captured, self._joins)
        if halves is None:
            whole = self._extract("B", segment, gradient, feeds)
        else:
            weights = self._extract("W", segment, halves.second, (*feeds, *halves.handed))
            whole = self._extract("B", segment, halves.first, feeds, halves.handed, weights)
        if self._recomputes(segment):
            whole = self._recomputing(segment, whole)
        self._backward[key] = whole

    def _recomputing(self, segment: Segment, backward: Backward) -> Backward:
        """Returns a backward pass after one that computes what the forward pass has not kept."""
        forward, held = self._forward[segment.index], self._held[segment.index]
        there = {id(t) for t in (*forward.feeds, *held, *backward.gradient.upstream)}
        later = backward.weights.feeds if backward.weights is not None else ()
        later = tuple(t for t in later if all(t is not handed for handed in backward.handed))
        wanted = {id(t): t for t in (*backward.feeds, *later) if id(t) not in there}
        if not wanted:
            return backward
        stop = {id(t) for t in (*forward.feeds, *held)} | self._captured
        operations = needed([t.op for t in wanted.values()], stop, lambda op: False)
        self._refuse_other_results(segment, [op for op in operations if op in segment.operations])
        read = {id(t) for op in operations for t in op.inputs}
        feeds = tuple(t for t in (*forward.feeds, *held) if id(t) in read)
        checked = [each.tensor for each in forward.activations]
        checked += tensors_to_read(checked)
        inside = set(operations) & set(segment.operations)
        pinned = [t for t in checked if t.op in inside]
        pinned += _with_fewer_readers(segment, operations)
        fetches = tuple((wanted | {id(t): t for t in pinned}).values())
        name = f"A{segment.index}"
        function = self._extractor.function(name, feeds, fetches, returns_all=True)
        return replace(backward, recompute=RecomputePass(function, feeds, fetches))

    def _extract(
        self,
        kind: str,
        segment: Segment,
        gradient: SegmentGradient,
        feeds: Sequence[Tensor],
        handed: tuple[Tensor, ...] = (),
        weights: Backward | None = None,
    ) -> Backward:
        """Extracts a backward pass, with only those `feeds` as arguments that it reads."""
        fetches = (*gradient.flat, *handed)
        stop = {id(t) for t in feeds} | self._captured
        operations = needed([t.op for t in fetches if id(t) not in stop], stop, lambda op: False)
        read = {id(t) for op in operations for t in op.inputs} | {id(t) for t in fetches}
        used = tuple(t for t in feeds if id(t) in read)
        from_loss = [] if kind == "W" else self._from_loss(gradient, used)
        looked_at = _checked((*from_loss, *gradient.gradients)) if self._checks_finite else ()
        function = self._extractor.function(
            f"{kind}{segment.index}", used, fetches, looked_at=looked_at
        )
        return Backward(function, used, gradient, handed, weights, looked_at)

    def _refuse_other_results(self, segment: Segment, again: Sequence[Op]) -> None:
        """Raises if operations would be run again that could give other results then."""
        names = [op.name for op in again if has_state(op)]
        if names:
            raise StepError(
                f"recompute: the gradient of model '{self.traced.name}' in partition "
                f"{segment.partition} would run {names} a second time, with other results. This "
                'happens if only some outputs have a gradient. Set "recompute" to "none" for this '
                "partition, or draw with keras.random and a seed generator."
            )

    def _from_loss(self, gradient: SegmentGradient, feeds: Sequence[Tensor]) -> list[Tensor]:
        """The upstream gradients of the model's results that a pass reads."""
        results, read = {id(t) for t in self.traced.results}, {id(t) for t in feeds}
        pairs = zip(gradient.outputs, gradient.upstream, strict=True)
        return [up for out, up in pairs if id(out) in results and id(up) in read]

    def _refuse_second_draw(
        self, segment: Segment, gradient: SegmentGradient, feeds: Sequence[Tensor]
    ) -> None:
        """Raises if recomputing a gradient from `feeds` would run a random operation again."""
        members = set(segment.operations)
        again = needed([t.op for t in gradient.flat], {id(t) for t in feeds}, lambda op: False)
        stateful = [op.name for op in again if op in members and _private.is_stateful(op)]
        if stateful:
            raise StepError(
                f"A gradient with respect to an input or a frozen variable of model "
                f"'{self.traced.name}' was asked for outside of what a GradientTape watched. It "
                f"would run the random operations {stateful} a second time, with other results. "
                "Compute the gradient with tf.GradientTape and tape.watch(...), or draw with "
                "keras.random and a seed generator."
            )


def _checked(gradients: Sequence[Gradient | None]) -> tuple[Tensor, ...]:
    """The tensors of gradients that may be not finite."""
    values = [g.values if isinstance(g, tf.IndexedSlices) else g for g in gradients]
    return tuple(t for t in values if t is not None and is_checked(t))


def _with_fewer_readers(segment: Segment, operations: Sequence[Op]) -> list[Tensor]:
    """Returns the results of operations that fewer of them read than of the whole segment.

    TensorFlow may fuse an operation into the only one that reads it.
    """
    forward, here = set(segment.operations), set(operations)
    return [
        tensor
        for op in operations
        if op in forward
        for tensor in op.outputs
        if any(reader in forward and reader not in here for reader in tensor.consumers())
    ]
