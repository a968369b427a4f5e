"""Makes an emitted segment differentiable for the user's tape.

To the tape, a segment is one function of its inputs and of the variables that it reads. A gradient
request emits the segment's backward call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Tensor
from opensmp.compiler.lowering.passes import Pass, RecomputePass
from opensmp.compiler.lowering.program import Program
from opensmp.compiler.lowering.segments import Segment
from opensmp.compiler.trace.differentiable import is_differentiable, is_differentiable_number
from opensmp.errors import StepError
from opensmp.execution.emission.emit_call import SECOND_ORDER

Emit = Callable[[str, Pass | RecomputePass, Sequence[Tensor]], list[Tensor]]


FROM_OUTSIDE = (
    "A derivative was asked for through a call of a DistributedModel or of an smp.step function, "
    "outside of the function that made the call. Gradients of a split model are taken inside an "
    "smp.step function: open the tf.GradientTape in it, take the gradient in it, and return the "
    "gradients. In forward mode, by a tf.autodiff.ForwardAccumulator, there are none."
)
_SECOND_ORDER = (
    "A gradient of a gradient was asked for through a DistributedModel by tf.gradients. Expected: "
    "tf.GradientTape for all of them, one tape within the other:\n\n"
    "    with tf.GradientTape() as outer:\n"
    "        with tf.GradientTape() as inner:\n"
    "            inner.watch(x)\n"
    "            outputs = model(x)\n"
    "        loss = tf.reduce_mean(inner.gradient(outputs, x) ** 2)\n"
    "    gradients = outer.gradient(loss, model.trainable_variables)\n\n"
    "In forward mode, by a tf.autodiff.ForwardAccumulator, there are none: TensorFlow takes two "
    "gradients of a function for it."
)


@dataclass(frozen=True, eq=False)
class Saved:
    """The arguments of a forward pass that ran in another function; its results and residuals."""

    args: Sequence[Tensor]
    results: Sequence[Tensor]


@dataclass(frozen=True, eq=False)
class LateGradient:
    """Gradients handed out as placeholders and computed only if the graph reads them.

    When a gradient is taken, it is not known whether the caller also uses those of inputs and of
    frozen variables. If a placeholder has a live consumer in the complete graph, the segment's
    forward pass is recomputed for its gradient.

    Attributes:
        program: The lowered model.
        segment: The segment.
        connected: The segment's outputs that have an upstream gradient.
        values: Values of the segment's inputs, variables and upstream gradients, by id.
        placeholders: Pairs of an input or variable of the segment and its gradient placeholder.
        emit: Emits the call.
    """

    program: Program
    segment: Segment
    connected: tuple[Tensor, ...]
    values: dict[int, Tensor]
    placeholders: tuple[tuple[Tensor, Tensor], ...]
    emit: Emit = field(repr=False)

    def compute(self, computed: Mapping[int, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Emits the computation and returns pairs of placeholder and gradient."""
        late = self.program.recompute(self.segment, self.connected)
        upstream = zip(late.gradient.upstream, late.gradient.outputs, strict=True)
        values = {key: computed.get(id(value), value) for key, value in self.values.items()}
        values |= {id(p): values[_upstream(t)] for p, t in upstream}
        results = self.emit("R", late, [values[id(t)] for t in late.feeds])
        found = {
            id(t): gradient
            for t, gradient in zip(late.gradient.wrt, late.gradient.pack(results), strict=True)
        }
        pairs = []
        for tensor, placeholder in self.placeholders:
            gradient = found[id(tensor)]
            if gradient is None:
                gradient = tf.zeros_like(self.values[id(tensor)])
            pairs.append((placeholder, tf.convert_to_tensor(gradient)))
        return pairs


def differentiable_call(
    program: Program,
    segment: Segment,
    args: Sequence[Tensor],
    emit: Emit,
    late: Callable[[LateGradient], None],
    taken: Callable[[Tensor, Any], None] = lambda leaf, gradient: None,
    saved: Saved | None = None,
) -> list[Tensor]:
    """Emits a segment's forward call such that the user's tape can differentiate through it.

    If an outer tape is recording, the returned gradients are differentiable too, to any order.
    `emit` emits a call of a kind on the segment's device; `late` is called with the gradients that
    were handed out as placeholders, `taken` with each feed and its gradient. A forward pass that
    has already run, `saved`, is not emitted again.
    """
    forward = program.forward(segment)
    graph = tf.compat.v1.get_default_graph()
    asked: set[int] = set()  # positions of the outputs that the current gradient request uses

    if saved is None:
        with _private.stop_recording():
            saved = Saved(args, emit("F", forward, args))
    results = list(saved.results)
    tensors = (*forward.feeds, *forward.outputs, *forward.residuals)
    values = {id(t): v for t, v in zip(tensors, [*saved.args, *results], strict=True)}
    connected_values = dict(zip(map(id, forward.feeds), args, strict=True))

    def gradient(*upstream: Any) -> list[Any]:
        if tf.compat.v1.get_default_graph() is not graph:
            return fails_when_run(forward.feeds, FROM_OUTSIDE, upstream)
        connected = [forward.outputs[i] for i in sorted(asked)]
        asked.clear()
        dense = {
            _upstream(output): tf.convert_to_tensor(value)
            for output, value in zip(forward.outputs, upstream, strict=True)
            if any(output is t for t in connected)
        }
        if _private.tape_is_active():
            # The outer tape has recorded the call's arguments, not the saved values.
            own = connected_values | dense
            upstream_of = {id(t): dense[_upstream(t)] for t in connected}
            found = _repeatable(
                program, segment, connected, forward.feeds, own, upstream_of, emit, taken
            )
        else:
            found = _required_gradients(program, segment, connected, values | dense, emit)
            found |= _late_gradients(program, segment, connected, values | dense, emit, late)
        gradients = [found.get(id(t)) for t in forward.feeds]
        for feed, value in zip(forward.feeds, gradients, strict=True):
            if value is not None:
                taken(feed, value)
        return gradients

    outputs = results[: len(forward.outputs)]
    if outputs:
        outputs = _private.with_gradient(outputs, args, gradient)
    return [
        port(result, asked, i) if is_differentiable(result) else result
        for i, result in enumerate(outputs)
    ]


def release_trace(graph: Any, traced: Sequence[Any]) -> None:
    """Frees what the calls and gradients of a complete graph hold, with the `traced` graphs.

    A gradient that is taken later fails when it is run.
    """

    def refuse(args: Sequence[Tensor], upstream: Sequence[Any]) -> list[Tensor | None]:
        return fails_when_run(args, FROM_OUTSIDE, upstream)

    _private.release_gradients(graph, refuse)
    _private.forget_bodies(graph)
    _private.keep_functions(graph, traced)


def _upstream(output: Tensor) -> int:
    """Dictionary key of an output's upstream gradient, distinct from that of the output's value."""
    return -id(output)


def port(tensor: Tensor, asked: set[int], position: int) -> Tensor:
    """Bridge that records `position` in `asked` when a gradient flows through it.

    A tape passes zeros for outputs that the loss does not depend on. Recording tells these zeros
    from real gradients, so that unconnected gradients stay None.
    """

    def gradient(upstream: Any) -> list[Any]:
        asked.add(position)
        return [upstream]

    return _private.with_gradient([tensor], [tensor], gradient)[0]


def _required_gradients(
    program: Program,
    segment: Segment,
    connected: Sequence[Tensor],
    values: dict[int, Tensor],
    emit: Emit,
) -> dict[int, Any]:
    backward = program.backward(segment, connected)
    if backward is None:
        return {}
    upstream = zip(backward.gradient.upstream, backward.gradient.outputs, strict=True)
    values = values | {id(p): values[_upstream(t)] for p, t in upstream}
    found: dict[int, Any] = {}
    half, kind = backward, "B"
    if backward.recompute is not None:
        again = backward.recompute
        with _private.stop_recording():
            computed = emit("A", again, [values[id(t)] for t in again.feeds])
        values |= dict(zip(map(id, again.fetches), computed, strict=True))
    while True:
        args = [values[id(t)] for t in half.feeds]
        with _private.stop_recording():
            results = emit(kind, half, args)
        size = len(half.gradient.flat)
        values |= {id(t): v for t, v in zip(half.handed, results[size:], strict=True)}
        results = results[:size]
        gradients = half.gradient.pack(results)
        found |= {id(t): g for t, g in zip(half.gradient.wrt, gradients, strict=True)}
        if half.weights is None:
            return found
        half, kind = half.weights, "W"


def _late_gradients(
    program: Program,
    segment: Segment,
    connected: Sequence[Tensor],
    values: dict[int, Tensor],
    emit: Emit,
    late: Callable[[LateGradient], None],
) -> dict[int, Tensor]:
    feeds = program.forward(segment).feeds
    optional = [t for t in feeds if program.is_optional(t) and t.dtype != tf.variant]
    if not optional or not connected:
        return {}
    # A gradient has the shape of its tensor. IdentityN connects the placeholders to all tensors
    # that the gradients depend on, so that differentiating a placeholder raises an error instead
    # of giving None.
    reasons = [values[id(t)] for t in feeds if is_differentiable_number(t)]
    reasons += [values[_upstream(t)] for t in connected]
    graph = tf.compat.v1.get_default_graph()
    with _private.stop_recording(), graph.gradient_override_map({"IdentityN": SECOND_ORDER}):
        stand_ins = tf.raw_ops.IdentityN(
            input=[*(values[id(t)] for t in optional), *reasons], name="late_gradient"
        )[: len(optional)]
    placeholders = list(zip(optional, stand_ins, strict=True))
    late(LateGradient(program, segment, tuple(connected), values, tuple(placeholders), emit))
    return {id(t): stand_in for t, stand_in in zip(optional, stand_ins, strict=True)}


def _repeatable(
    program: Program,
    segment: Segment,
    connected: Sequence[Tensor],
    feeds: Sequence[Tensor],
    values: Mapping[int, Tensor],
    upstream: Mapping[int, Tensor],
    emit: Emit,
    taken: Callable[[Tensor, Any], None],
) -> dict[int, Tensor]:
    """Gradients that can be differentiated again: one call computes all of them from the feeds.

    Maps the id of a feed to its gradient; feeds without a gradient are left out.
    """
    derived = program.derivative(segment, connected, feeds)
    if derived is None:
        return {}
    graph = tf.compat.v1.get_default_graph()
    pairs = zip(derived.gradient.upstream, derived.gradient.outputs, strict=True)
    values = {**values, **{id(p): upstream[id(t)] for p, t in pairs}}
    args = [values[id(t)] for t in derived.feeds]
    with _private.stop_recording():
        results = emit("R", derived, args)
    if _private.tape_is_active():
        asked: set[int] = set()

        def gradient(*given: Any) -> list[Any]:
            if tf.compat.v1.get_default_graph() is not graph:
                return fails_when_run(derived.feeds, FROM_OUTSIDE, given)
            chosen = {i: tf.convert_to_tensor(given[i]) for i in sorted(asked)}
            asked.clear()
            targets = [derived.gradient.flat[i] for i in chosen]
            of_targets = {id(derived.gradient.flat[i]): value for i, value in chosen.items()}
            found = _repeatable(
                program, segment, targets, derived.feeds, values, of_targets, emit, taken
            )
            gradients = [found.get(id(t)) for t in derived.feeds]
            for feed, value in zip(derived.feeds, gradients, strict=True):
                if value is not None:
                    taken(feed, value)
            return gradients

        results = _private.with_gradient(results, args, gradient)
        results = [port(result, asked, i) for i, result in enumerate(results)]
    gradients = derived.gradient.pack(results)
    found = zip(derived.gradient.wrt, gradients, strict=True)
    return {id(t): gradient for t, gradient in found if gradient is not None}


@tf.RegisterGradient(SECOND_ORDER)
@tf.autograph.experimental.do_not_convert
def _refuse_second_order(op: Any, *upstream: Any) -> Any:
    if op is None:  # tf.saved_model.save queries the gradients of all operations
        return None
    raise StepError(_SECOND_ORDER)


def fails_when_run(
    tensors: Sequence[Tensor], message: str, upstream: Sequence[Any] = ()
) -> list[Tensor | None]:
    """Returns gradients of `tensors` that raise an error only when they are computed.

    Derivatives of these gradients with respect to `upstream` fail as well, because TensorFlow uses
    them to compute a function's forward-mode derivatives.
    """
    given = [tf.convert_to_tensor(each) for each in upstream]
    with tf.control_dependencies([tf.debugging.Assert(tf.constant(False), [message])]):
        zeros = [
            tf.zeros([size or 1 for size in t.shape or ()], t.dtype)
            if is_differentiable_number(t)
            else None
            for t in tensors
        ]
    made = [each for each in zeros if each is not None]
    if not given or not made:
        return zeros
    connected = iter(_private.with_gradient(made, given, lambda *_: fails_when_run(given, message)))
    return [None if each is None else next(connected) for each in zeros]
