"""Sends activations and their gradients between processes in half precision, if so configured."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import tensorflow as tf

from opensmp.base.types import Op
from opensmp.distributed.transport.transfer import Transfer
from opensmp.execution.multi_process.placer import Layout

EXACT = "none"
"""The value of the key `wire_dtype` with which everything is sent as it is."""


def on_the_wire(
    layout: Layout, dtype: str, calls: Collection[Op], exact: Collection[int], process: int
) -> Sequence[Transfer]:
    """The transfers of a step as they are sent, in the same order.

    What one call computes and only calls read is sent as `dtype` if it is float32. Weights, losses,
    what the step returns (`exact`, ids of tensors) and what the user's operations read keep theirs.
    Elsewhere than in the sending `process` a changed tensor is only a specification.
    """
    if dtype == EXACT:
        return layout.transfers
    wire = tf.as_dtype(dtype)
    found = []
    for transfer in layout.transfers:
        tensor = transfer.tensor
        if tensor is None or not _is_between_calls(transfer, layout, calls, exact):
            found.append(transfer)
            continue
        if transfer.source == process:
            with tf.device(tensor.device):
                narrow = tf.cast(tensor, wire)
        else:
            narrow = tf.TensorSpec(tensor.shape, wire)
        found.append(dataclasses.replace(transfer, tensor=narrow))
    return found


def _is_between_calls(
    transfer: Transfer, layout: Layout, calls: Collection[Op], exact: Collection[int]
) -> bool:
    there = layout.runs[transfer.target]
    source = transfer.op
    while source.type == "Identity":  # TensorFlow puts one behind a call with a gradient of its own
        source = source.inputs[0].op
    return bool(
        source in calls
        and all(
            tensor.dtype == tf.float32 and id(tensor) not in exact for tensor in transfer.aliases
        )
        and all(
            reader in calls
            for tensor in transfer.aliases
            for reader in tensor.consumers()
            if reader in there
        )
    )
