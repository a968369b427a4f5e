"""A first run of a step's function that only prepares the models.

`tf.function` likewise traces a function twice if it creates variables: in the second trace, which
is kept, all variables exist and are placed, so that variable lists, watching tapes and optimizers
see the same variables from the start.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Tensor
from opensmp.compiler.lowering.extraction import needed
from opensmp.compiler.trace.differentiable import is_differentiable_number
from opensmp.compiler.trace.structure import Structure
from opensmp.compiler.trace.trace import TracedGraph, call_inputs
from opensmp.compiler.trace.variables import tf_variable
from opensmp.execution.context import Prepare, as_current
from opensmp.execution.emission.model_traces import ModelTraces


class WarmUpRunner:
    """Replaces the pipeline as runner: partitions models, and returns placeholders.

    Args:
        num_microbatches: Like that of `Pipeline`.

    Attributes:
        traces: The traces of the calls, for the run that counts.
    """

    def __init__(self, num_microbatches: int) -> None:
        self.num_microbatches = num_microbatches
        self.traces = ModelTraces()

    def run(
        self, model: Any, prepare: Prepare, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, list[Tensor]]:
        """Partitions a model and returns what stands for its results; see `Pipeline.run`."""
        call = Structure.of((args, dict(kwargs)))
        key = self.traces.key(model, call)
        traced = self.traces.prepared(key, model, lambda: prepare(args, kwargs)).traced
        if any(map(tf.is_symbolic_tensor, (outer for outer, _ in traced.captures))):
            self.traces.forget(key)  # tensors of this graph
        leaves = _leaves(traced, call)
        outputs, losses = (
            _stand_ins(tensors, leaves) for tensors in (traced.outputs, traced.losses)
        )
        for output, mask, logits in zip(outputs, traced.masks, traced.logits, strict=True):
            if mask is not None:
                _private.set_mask(output, _stand_ins([mask], leaves)[0])
            if logits is not None:
                _private.set_logits(output, _stand_ins([logits], leaves)[0])
        return traced.output_structure.pack(outputs), losses


@contextlib.contextmanager
def warming_up(num_microbatches: int) -> Iterator[ModelTraces]:
    """Context in which a step's function may run in a temporary graph.

    Yields:
        The traces of the models that it calls.
    """
    runner = WarmUpRunner(num_microbatches)
    with _private.new_graph("rehearsal").as_default(), as_current(runner):
        yield runner.traces


def _leaves(traced: TracedGraph, call: Structure) -> list[Tensor]:
    """The inputs and reads of variables that results depend on."""
    used = set(needed([t.op for t in traced.results], (), lambda op: False))
    pairs = [*zip(traced.inputs, call_inputs(call), strict=True)]
    pairs += [
        (leaf.placeholder, tf.convert_to_tensor(tf_variable(leaf.variable)))
        for leaf in traced.variables
        if leaf.placeholder.op in used
    ]
    return [value for placeholder, value in pairs if placeholder.op in used]


def _stand_ins(tensors: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Placeholders like `tensors`, from which gradients of any order flow to all `leaves`."""
    with _private.stop_recording():
        made = [tf.compat.v1.placeholder(t.dtype, t.shape) for t in tensors]
    for tensor, placeholder in zip(tensors, made, strict=True):
        _private.copy_handle_data(tensor, placeholder)
    numbers = [t for t in leaves if is_differentiable_number(t)]
    positions = [i for i, t in enumerate(made) if is_differentiable_number(t)]
    if not numbers or not positions:
        return made

    def gradient(*upstream: Tensor) -> list[Tensor]:
        return _stand_ins(numbers, [*numbers, *map(tf.convert_to_tensor, upstream)])

    connected = _private.with_gradient([made[i] for i in positions], numbers, gradient)
    for position, tensor in zip(positions, connected, strict=True):
        made[position] = tensor
    return made
