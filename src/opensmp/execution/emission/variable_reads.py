"""Reads of variables, shared by all microbatches of a step."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Tensor
from opensmp.compiler.trace.variables import tf_variable

# Operations that leave a variable as it is.
_READS = frozenset(
    (
        "DisableCopyOnRead",
        "ReadVariableOp",
        "ResourceGather",
        "ResourceGatherNd",
        "VarIsInitializedOp",
        "VariableShape",
    )
)


class VariableReads:
    """Reads each variable once, and again only after operations that may have changed it.

    A read for each microbatch would make most of a step's operations.
    """

    def __init__(self) -> None:
        self._read: dict[int, tuple[Any, Tensor, int]] = {}

    def value(self, variable: Any) -> Tensor:
        """The value of a variable at this point of the graph; all tapes record the read."""
        stored = tf_variable(variable)
        if id(variable) in self._read:
            _, known, changes = self._read[id(variable)]
            if _num_changes(known) == changes:
                _private.record_read(stored, known)
                return known
        value = tf.convert_to_tensor(stored)
        now = _num_changes(value)
        if now is not None:
            self._read[id(variable)] = variable, value, now
        return value


def _num_changes(value: Tensor) -> int | None:
    """Number of operations of the graph that may change the variable that a value was read from.

    None if it is not a plain read of a variable.
    """
    op = value.op
    while op.type == "Identity":
        op = op.inputs[0].op
    if op.type != "ReadVariableOp":
        return None
    return sum(consumer.type not in _READS for consumer in op.inputs[0].consumers())
