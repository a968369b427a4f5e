"""Traces one call of a model into one graph with explicit inputs, variables and state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Op, Tensor
from opensmp.compiler.trace import partition_tags
from opensmp.compiler.trace.layer_spans import LayerSpan, recorded_spans
from opensmp.compiler.trace.structure import Structure
from opensmp.compiler.trace.variables import VariableInput, VariableScope
from opensmp.errors import TraceError


@dataclass(frozen=True, eq=False)
class TracedGraph:
    """A traced model: its graph with explicit inputs, variables, captures and state updates.

    Attributes:
        name: Name of the model.
        graph: The function graph.
        operations: Its operations after the trace, in topological order.
        inputs: Placeholders of the call's tensor arguments, then of their Keras masks.
        variables: Placeholders of the variables read.
        captures: Pairs (tensor outside, placeholder) of everything else that comes from outside:
            constants, lookup tables, other resources.
        outputs: Flat output tensors; each is produced by its own identity operation.
        output_structure: The structure to pack them (and the non-tensor leaves) into.
        masks: Keras masks of the outputs, None for an output without a mask.
        logits: The logits of outputs that are probabilities, None for the others; Keras'
            cross-entropies use them.
        losses: Scalars added by `add_loss` and by activity regularisers.
        updates: Pairs (variable, new value) of the variables that the call assigns to.
        spans: The operations of each layer call.
        new_variables: Variables created during the trace, not yet allocated.
    """

    name: str
    graph: Any
    operations: tuple[Op, ...]
    inputs: tuple[Tensor, ...]
    variables: tuple[VariableInput, ...]
    captures: tuple[tuple[Tensor, Tensor], ...]
    outputs: tuple[Tensor, ...]
    output_structure: Structure
    masks: tuple[Tensor | None, ...]
    logits: tuple[Tensor | None, ...]
    losses: tuple[Tensor, ...]
    updates: tuple[tuple[Any, Tensor], ...]
    spans: tuple[LayerSpan, ...]
    new_variables: tuple[Any, ...]

    @cached_property
    def sources(self) -> frozenset[Op]:
        """Placeholder operations: inputs, variables and captures."""
        tensors = [*self.inputs, *(v.placeholder for v in self.variables)]
        tensors += [inner for _, inner in self.captures]
        return frozenset(tensor.op for tensor in tensors)

    @cached_property
    def results(self) -> tuple[Tensor, ...]:
        """All tensors that leave the graph: outputs, masks, logits, losses and new state."""
        beside = [tensor for tensor in (*self.masks, *self.logits) if tensor is not None]
        return (*self.outputs, *beside, *self.losses, *(value for _, value in self.updates))

    def __str__(self) -> str:
        return (
            f"{self.name}: {len(self.operations)} operations, {len(self.inputs)} inputs, "
            f"{len(self.variables)} variables, {len(self.updates)} updated, "
            f"{len(self.outputs)} outputs"
        )


def call_inputs(call: Structure) -> tuple[Tensor, ...]:
    """Returns the inputs of a traced graph for a call: its tensors, then their Keras masks."""
    masks = [_private.get_mask(tensor) for tensor in call.tensors]
    return (*call.tensors, *(mask for mask in masks if mask is not None))


def call_signature(call: Structure) -> tuple[Any, ...]:
    """Returns a key that is equal for calls that one traced graph can serve."""
    return (call.signature(), *(_private.get_mask(tensor) is not None for tensor in call.tensors))


def trace(
    call: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], *, name: str
) -> TracedGraph:
    """Traces `call(*args, **kwargs)` into a new graph.

    Raises:
        TraceError: If the model does something that one graph cannot express.
        PartitionError: If an `smp.partition` context lies inside a loop body.
    """
    structure = Structure.of((tuple(args), dict(kwargs)))
    graph = _private.new_graph(f"trace_{name}")
    scope = VariableScope(graph)
    with graph.as_default(), recorded_spans(graph) as spans, partition_tags.tracing_into(graph):
        placeholders = []
        for i, tensor in enumerate(call_inputs(structure)):
            placeholder = tf.compat.v1.placeholder(tensor.dtype, tensor.shape, name=f"input_{i}")
            _private.copy_handle_data(tensor, placeholder)
            placeholders.append(placeholder)
        num_tensors = len(structure.tensors)
        call_args, call_kwargs = structure.pack(placeholders[:num_tensors])
        mask_placeholders = iter(placeholders[num_tensors:])
        for tensor, placeholder in zip(structure.tensors, placeholders, strict=False):
            if _private.get_mask(tensor) is not None:
                _private.set_mask(placeholder, next(mask_placeholders))
        control = _private.automatic_control_dependencies()
        with control, scope.collecting(), _private.eager_builds():
            outputs = Structure.of(call(*call_args, **call_kwargs))
            masks = [_private.get_mask(tensor) for tensor in outputs.tensors]
            logits = [_private.get_logits(tensor) for tensor in outputs.tensors]
            losses = [_own(graph, loss, "a loss") for loss in scope.losses]
            results = [_own(graph, tensor, "an output") for tensor in outputs.tensors]
            masks = [None if mask is None else _own(graph, mask, "a mask") for mask in masks]
            logits = [None if x is None else _own(graph, x, "logits") for x in logits]
    captures = tuple(_private.captures(graph))
    _refuse_tensors_around(name, captures)
    return TracedGraph(
        name=name,
        graph=graph,
        operations=tuple(graph.get_operations()),
        inputs=tuple(placeholders),
        variables=scope.inputs,
        captures=captures,
        outputs=tuple(results),
        output_structure=outputs,
        masks=tuple(masks),
        logits=tuple(logits),
        losses=tuple(losses),
        updates=scope.updates,
        spans=tuple(spans),
        new_variables=tuple(_private.take_pending_variables()),
    )


def _refuse_tensors_around(name: str, captures: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Rejects captured symbolic tensors: they differ between microbatches but are not arguments."""
    read = [outer.name for outer, _ in captures if hasattr(outer, "graph")]
    if read:
        more = f" and {len(read) - 1} more" if len(read) > 1 else ""
        raise TraceError(
            f"The call of model '{name}' reads tensor '{read[0]}'{more}, which the function around "
            "it has computed, by an attribute or a variable of Python. Expected: what the call "
            "computes with are its arguments and the model's own variables. Pass it to the call, "
            "model(x, scale=scale) or model([x, scale]), so that it is divided into microbatches "
            "and sent to its partition as x is; or compute it in the model."
        )


def _own(graph: Any, tensor: Tensor, what: str) -> Tensor:
    """Returns the tensor through its own identity operation, on its producer's partition."""
    producer = getattr(tensor, "graph", graph)
    if producer is not graph:
        raise TraceError(
            f"The model returns {what}, {tensor.name}, that was made inside a loop body, a "
            "branch or a nested tf.function and never returned from it. Return it from that "
            "body, or use a Python loop."
        )
    tag = _private.tag_of(tensor.op) if hasattr(tensor, "graph") else None
    if tag is None:
        return tf.identity(tensor)
    with _private.tagged(graph, tag):
        return tf.identity(tensor)
