"""Makes an emitted segment differentiable for the user's tape.

To the tape a segment is one function of its inputs and of the variables it reads.
When the user asks for gradients, the segment's backward call is emitted in answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.errors import StepError
from opensmp.program import Program, Segment

Tensor = Any
Emit = Callable[[str, Any, Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True, eq=False)
class LateGradient:
    """Gradients that were handed out as placeholders, to be computed only if used.

    Nobody can tell while a gradient is taken whether the caller wants it for an input
    or a frozen variable as well. If in the end something reads a placeholder, the
    segment's forward pass runs again to compute it.

    Attributes:
        program: The lowered model.
        segment: The segment.
        connected: Outputs of the segment that have a gradient.
        values: Values of the segment's inputs, variables and upstream gradients.
        placeholders: Input or variable of the segment, and what was handed out for it.
        emit: Emits the call.
    """

    program: Program
    segment: Segment
    connected: tuple[Tensor, ...]
    values: dict[int, Tensor]
    placeholders: tuple[tuple[Tensor, Tensor], ...]
    emit: Emit = field(repr=False)

    def compute(self) -> list[tuple[Tensor, Tensor]]:
        """Emits the computation; pairs of placeholder and gradient."""
        late = self.program.recompute(self.segment, self.connected)
        upstream = zip(late.gradient.upstream, late.gradient.outputs, strict=True)
        values = self.values | {id(p): self.values[_upstream(t)] for p, t in upstream}
        results = self.emit("R", late.function, [values[id(t)] for t in late.feeds])
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
) -> list[Tensor]:
    """Emits a segment's forward call so that gradients through it can be taken.

    Args:
        program: The lowered model.
        segment: The segment to run.
        args: Values of its feeds.
        emit: Emits a call of a kind ("F", "B", "R") on the segment's device.
        late: Told of gradients that were handed out as placeholders.

    Returns:
        Values of the segment's outputs.
    """
    forward = program.forward(segment)
    asked: set[int] = set()  # positions of the outputs that the current gradient came from

    @tf.custom_gradient
    def run(*args: Tensor) -> Any:
        with _private.stop_recording():
            results = emit("F", forward.function, args)
        tensors = (*forward.feeds, *forward.outputs, *forward.residuals)
        values = {id(t): v for t, v in zip(tensors, [*args, *results], strict=True)}

        def gradient(*upstream: Any) -> list[Any]:
            connected = [forward.outputs[i] for i in sorted(asked)]
            asked.clear()
            dense = {
                _upstream(output): tf.convert_to_tensor(value)
                for output, value in zip(forward.outputs, upstream, strict=True)
                if any(output is t for t in connected)
            }
            found = _required_gradients(program, segment, connected, values | dense, emit)
            found |= _late_gradients(program, segment, connected, values | dense, emit, late)
            return [found.get(id(t)) for t in forward.feeds]

        return tuple(results[: len(forward.outputs)]), gradient

    results = run(*args)
    return [
        _port(result, asked, i) if result.dtype.is_floating or result.dtype.is_complex else result
        for i, result in enumerate(results)
    ]


def _upstream(output: Tensor) -> int:
    """Key under which the gradient of an output is kept beside the output's own value."""
    return -id(output)


def _port(tensor: Tensor, asked: set[int], position: int) -> Tensor:
    """Identity that notes when a gradient comes through.

    A tape gives zeros for outputs that the loss does not depend on; only so can they
    be told from real gradients, and unconnected gradients stay None.
    """

    @tf.custom_gradient
    def through(value: Tensor) -> Any:
        def gradient(upstream: Any) -> Any:
            asked.add(position)
            return upstream

        return tf.identity(value), gradient

    return through(tensor)


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
    args = [values[id(t)] for t in backward.feeds]
    with _private.stop_recording():
        results = emit("B", backward.function, args)
    if _private.tape_is_active():
        results = _once_differentiable(results, args)
    gradients = backward.gradient.pack(results)
    return {id(t): g for t, g in zip(backward.gradient.wrt, gradients, strict=True)}


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
    placeholders = [
        (t, tf.compat.v1.placeholder(t.dtype, values[id(t)].shape, name="late_gradient"))
        for t in optional
    ]
    late(LateGradient(program, segment, tuple(connected), values, tuple(placeholders), emit))
    return {id(t): placeholder for t, placeholder in placeholders}


def _once_differentiable(results: Sequence[Tensor], args: Sequence[Tensor]) -> list[Tensor]:
    """The results of a backward call, with an error for whoever differentiates them."""

    @tf.custom_gradient
    def guard(*tensors: Tensor) -> Any:
        def gradient(*upstream: Any) -> Any:
            raise StepError(
                "A gradient of a gradient was asked for through a DistributedModel. The "
                "backward pass of a split model cannot be differentiated again. Take the outer "
                "gradient through a plain Keras model, or keep penalties on gradients outside "
                "of the split model."
            )

        return tuple(tf.identity(t) for t in tensors[: len(results)]), gradient

    floating = [t for t in args if t.dtype.is_floating]
    return list(guard(*results, *floating))
