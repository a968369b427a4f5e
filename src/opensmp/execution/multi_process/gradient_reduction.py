"""Reduces gradients over replicas, in the processes that own them, and tensors over ranks."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from opensmp.base.types import Tensor
from opensmp.compiler.lowering.sparse_gradients import SameRows, with_values
from opensmp.compiler.trace.variables import is_keras, tf_variable
from opensmp.distributed.collectives.reduce import all_reduce, check_summable
from opensmp.distributed.collectives.sparse import slices_of_all
from opensmp.distributed.world import current
from opensmp.errors import CommunicationError
from opensmp.execution.multi_process.remote_gradient import is_elsewhere
from opensmp.execution.multi_process.remote_values import is_kept_elsewhere, like

_CALL = "smp.allreduce"


def reduce_tensors(tensor: Any, op: str, members: tuple[int, ...]) -> Any:
    """Mean or sum (`op`) over ranks of a numeric tensor or a nest; sparse tensors become dense.

    `None` stays `None`.
    """
    leaves = tf.nest.flatten(tensor)
    dense = [(index, _dense(leaf)) for index, leaf in enumerate(leaves) if leaf is not None]
    return tf.nest.pack_sequence_as(tensor, _reduced(leaves, dense, op, members))


def reduce_gradients(tensor: Any, op: str, members: tuple[int, ...]) -> Any:
    """Like `reduce_tensors`, over the replicas of the model, for gradients.

    `tf.IndexedSlices` stay sparse. Gradients that other ranks of the replica reduce are represented
    by `RemoteGradient`. `members` are the rank in each replica.
    """
    is_spread = len(current(_CALL).mp_group) > 1
    leaves = tf.nest.flatten(tensor)
    results = list(leaves)
    dense: list[tuple[int, Tensor]] = []
    for index, leaf in enumerate(leaves):
        if leaf is None or (is_spread and is_elsewhere(leaf)):
            continue
        if is_spread and is_kept_elsewhere(leaf):
            results[index] = like(leaf)
        elif isinstance(leaf, SameRows):
            dense.append((index, tf.convert_to_tensor(leaf.values)))
        elif isinstance(leaf, tf.IndexedSlices):
            slices = slices_of_all(leaf, members, name="smp.allreduce of slices")
            results[index] = _divided(slices, len(members)) if op == "mean" else slices
        else:
            dense.append((index, _dense(leaf)))
    results = _reduced(results, dense, op, members)
    for index, _ in dense:
        if isinstance(leaves[index], SameRows):
            results[index] = leaves[index].with_values(results[index])
    return tf.nest.pack_sequence_as(tensor, results)


def _reduced(
    leaves: list[Any], dense: list[tuple[int, Tensor]], op: str, members: tuple[int, ...]
) -> list[Any]:
    """Copies `leaves` with the reduced tensors at their indices."""
    tensors, name = [t for _, t in dense], f"{_CALL} {op}"
    check_summable(tensors, name)  # also in one process, where nothing is reduced
    results = list(leaves)
    sums = all_reduce(tensors, members, mean=op == "mean", name=name)
    for (index, _), total in zip(dense, sums, strict=True):
        results[index] = total
    return results


def _dense(value: Any) -> Tensor:
    if isinstance(value, (tf.RaggedTensor, tf.SparseTensor)):
        raise CommunicationError(
            f"smp.allreduce: a {type(value).__name__} cannot be reduced. Expected: tensors or "
            "tf.IndexedSlices. Make it dense with to_tensor() or tf.sparse.to_dense."
        )
    try:
        return tf.convert_to_tensor(tf_variable(value) if is_keras(value) else value)
    except (TypeError, ValueError) as error:
        raise CommunicationError(
            f"smp.allreduce: a value of type {type(value).__name__} is no tensor ({error}). "
            "Expected: a tensor, what can be made one, or a list, tuple or dict of them."
        ) from error


def _divided(slices: Any, count: int) -> Any:
    values = slices.values / tf.cast(count, slices.values.dtype)
    return with_values(slices, values)
