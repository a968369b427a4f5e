"""One call of a lowered function in the step's graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from opensmp import _private

Op = Any
Tensor = Any
ConcreteFunction = Any


def emit_call(
    function: ConcreteFunction, args: Sequence[Tensor], name: str
) -> tuple[Op, list[Tensor]]:
    """Emits one call on the current device.

    The call is always of the stateless kind, even where the body has side effects:
    TensorFlow would chain stateful calls in the order of their creation and so run
    the microbatches one after the other. The schedule orders them instead.

    Returns:
        The operation of the call and its results.
    """
    outputs = function.outputs
    results = tf.raw_ops.PartitionedCall(
        args=[*args, *function.captured_inputs],
        Tout=[t.dtype for t in outputs],
        f=function,
        name=name,
    )
    if isinstance(results, tf.Operation):
        return results, []
    results = list(results) if isinstance(results, (list, tuple)) else [results]
    for result, output in zip(results, outputs, strict=True):
        result.set_shape(output.shape)
        _private.copy_handle_data(output, result)
    return results[0].op, results
