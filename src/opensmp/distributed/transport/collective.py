"""Sends and receives tensors between processes inside a step's graph, over collectives.

Uses TensorFlow's point-to-point collectives: a broadcast in a group of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from opensmp.base.types import Op, Tensor
from opensmp.distributed.collectives.chunks import chunk_sizes
from opensmp.distributed.collectives.keys import instance_of_shape, registry
from opensmp.distributed.transport.transfer import Transfer

_AS_THEY_ARE = (tf.float32, tf.float64, tf.float16, tf.int32, tf.int64, tf.bool)
_BITS = {
    tf.bfloat16: tf.float16,
    tf.int16: tf.float16,
    tf.uint16: tf.float16,
    tf.uint32: tf.int32,
    tf.uint64: tf.int64,
    tf.complex64: tf.int64,
}


class Transport:
    """Inserts send and receive operations into a graph.

    Each transport has `send` and `receive` of its own; the other methods do nothing by default.
    """

    def send(self, transfer: Transfer, number: int) -> Sent:
        """Inserts the send; a transfer without a tensor only signals that `transfer.op` is done.

        `number` is that of the transfer, the same in both processes.
        """
        raise NotImplementedError

    def receive(self, transfer: Transfer, number: int) -> Received:
        """Inserts the receive operation."""
        raise NotImplementedError

    def begin_run(self, number: int) -> None:
        """Must be called in each run of the step, numbered from 1, before anything is sent."""

    def end_run(self) -> None:
        """Must be called in each run of the step, after everything was sent and received."""

    def interrupt(self) -> None:
        """Makes waiting and later runs fail until `restart`."""

    def restart(self, number: int) -> None:
        """Resets the transport; all processes of the step call it, while none runs the step.

        `number` is that of the last run before the next one; greater than all earlier numbers.
        """


class Sent(NamedTuple):
    """The operation that ends when a tensor was sent, and whether it waits for the receiver."""

    op: Op
    waits: bool = True


class Received(NamedTuple):
    """An inserted receive.

    Attributes:
        tensor: The received tensor.
        posted: The operations that wait for it.
        early: Whether they must be posted before the tensor is needed, because the sender waits for
            them; False if the tensor arrives without that.
    """

    tensor: Tensor
    posted: list[Op]
    early: bool = True


class CollectiveTransport(Transport):
    """Transfers over TensorFlow's collective runtime (gRPC).

    A run needs nothing else: all collectives of the process are interrupted at once.

    Args:
        ranks: Rank in the world of each process of this replica.
        device: Host device of this process, on which the collectives run.
        trace: Number of this trace, the same in both processes and never used before: the meaning
            of keys must not change during the life of the processes.
    """

    def __init__(self, ranks: Sequence[int], device: str, trace: int) -> None:
        self._ranks = tuple(ranks)
        self._device = device
        self._trace = trace

    def send(self, transfer: Transfer, number: int) -> Sent:
        """Inserts the send operation; see `Transport`."""
        with tf.device(self._device):
            if transfer.tensor is None:
                with tf.control_dependencies([transfer.op]):
                    sendable = tf.constant(0)
            else:
                sendable = _pack(transfer.tensor)
            if sendable.shape.num_elements() == 0:
                return Sent(tf.no_op())  # the collectives crash on empty tensors
            if sendable.shape.is_fully_defined():
                sizes = chunk_sizes(sendable)
                parts = [sendable]
                if len(sizes) > 1:
                    parts = list(tf.split(tf.reshape(sendable, [-1]), sizes))
                sent = [
                    self._send(part, transfer, self._key(transfer, number, part, i))
                    for i, part in enumerate(parts)
                ]
            else:
                shape = tf.shape(sendable)
                sent = [
                    self._send(shape, transfer, self._key(transfer, number, shape, 0)),
                    self._send(
                        _with_one_more(sendable),
                        transfer,
                        self._key_of_one(transfer, number, shape),
                    ),
                ]
            return Sent(sent[0].op if len(sent) == 1 else tf.group(*sent))

    def receive(self, transfer: Transfer, number: int) -> Received:
        """Inserts the receive operation; see `Transport`."""
        sent = tf.TensorSpec([], tf.int32) if transfer.tensor is None else transfer.tensor
        packed = _packed(sent)
        with tf.device(self._device):
            if packed.shape.num_elements() == 0:
                nothing = tf.zeros(packed.shape, packed.dtype)
                return Received(_unpack(nothing, sent), [nothing.op])
            if packed.shape.is_fully_defined():
                sizes = chunk_sizes(packed)
                specs = [packed]
                if len(sizes) > 1:
                    specs = [tf.TensorSpec([size], packed.dtype) for size in sizes]
                parts = [
                    self._receive(
                        tf.constant(spec.shape.as_list(), tf.int32),
                        spec.dtype,
                        transfer,
                        self._key(transfer, number, spec, i),
                    )
                    for i, spec in enumerate(specs)
                ]
                ops = [part.op for part in parts]
                value = parts[0]
                if len(parts) > 1:
                    value = tf.reshape(tf.concat(parts, 0), packed.shape)
            else:
                spec = tf.TensorSpec([packed.shape.rank], tf.int32)
                shape = self._receive(
                    tf.constant([packed.shape.rank]),
                    tf.int32,
                    transfer,
                    self._key(transfer, number, spec, 0),
                )
                key = self._key_of_one(transfer, number, shape)
                count = tf.reduce_prod(shape, keepdims=True)
                flat = self._receive(count + 1, packed.dtype, transfer, key)
                value = tf.reshape(flat[:-1], shape)
                value.set_shape(packed.shape)
                ops = [shape.op]
            return Received(_unpack(value, sent), ops)

    # --- keys ---------------------------------------------------------------------------

    def _pair(self, transfer: Transfer) -> tuple[int, int]:
        low, high = sorted((self._ranks[transfer.source], self._ranks[transfer.target]))
        return low, high

    def _key(self, transfer: Transfer, number: int, spec: Any, chunk: int) -> tuple[int, int]:
        group = registry.group(self._pair(transfer))
        shape = tuple(spec.shape.as_list())
        meaning = (self._trace, number, chunk, transfer.source, spec.dtype.name, shape)
        return group, registry.instance(group, meaning)

    def _key_of_one(self, transfer: Transfer, number: int, shape: Tensor) -> tuple[int, Tensor]:
        """Keys of a tensor of unknown shape, in a group that has no other use."""
        use = f"tensor {number} of trace {self._trace} from {transfer.source}"
        return registry.group(self._pair(transfer), (use, use)), instance_of_shape(shape)

    # --- the collective operations; they take no timeout, which would leak threads ------

    def _send(self, tensor: Tensor, transfer: Transfer, key: tuple[int, Any]) -> Tensor:
        group, instance = key
        return tf.raw_ops.CollectiveBcastSendV2(
            input=tensor,
            group_size=2,
            group_key=group,
            instance_key=instance,
            timeout_seconds=0,
        )

    def _receive(
        self, shape: Tensor, dtype: Any, transfer: Transfer, key: tuple[int, Any]
    ) -> Tensor:
        group, instance = key
        return tf.raw_ops.CollectiveBcastRecvV2(
            group_size=2,
            group_key=group,
            instance_key=instance,
            shape=shape,
            T=dtype,
            timeout_seconds=0,
        )


def _with_one_more(tensor: Tensor) -> Tensor:
    """Flattens a tensor and appends one element: the collectives crash on empty tensors."""
    return tf.concat([tf.reshape(tensor, [-1]), tf.zeros([1], tensor.dtype)], 0)


def _goes_as_bytes(spec: Any) -> bool:
    """Whether a tensor is serialized for transfer: strings, and tensors of unknown rank."""
    return bool(spec.dtype == tf.string or spec.shape.rank is None)


def _packed(spec: Any) -> Any:
    """Shape and dtype in which a tensor is transferred."""
    if _goes_as_bytes(spec):
        return tf.TensorSpec([None], tf.int32)
    if spec.dtype in _AS_THEY_ARE:
        return tf.TensorSpec(spec.shape, spec.dtype)
    if spec.dtype == tf.complex128:
        return tf.TensorSpec(tf.TensorShape([2]).concatenate(spec.shape), tf.float64)
    # Numbers of 8 bits and fewer, which these hold exactly.
    small = tf.float16 if spec.dtype.is_floating else tf.int32
    return tf.TensorSpec(spec.shape, _BITS.get(spec.dtype, small))


def _pack(tensor: Tensor) -> Tensor:
    if _goes_as_bytes(tensor):
        return tf.cast(tf.io.decode_raw(tf.io.serialize_tensor(tensor), tf.uint8), tf.int32)
    if tensor.dtype in _AS_THEY_ARE:
        return tensor
    if tensor.dtype in _BITS:
        return tf.bitcast(tensor, _BITS[tensor.dtype])
    if tensor.dtype == tf.complex128:
        return tf.stack([tf.math.real(tensor), tf.math.imag(tensor)])
    return tf.cast(tensor, _packed(tensor).dtype)


def _unpack(tensor: Tensor, spec: Any) -> Tensor:
    dtype = spec.dtype
    if _goes_as_bytes(spec):
        letters = tf.gather(tf.constant([bytes([code]) for code in range(256)]), tensor)
        value = tf.io.parse_tensor(tf.strings.reduce_join(letters), dtype)
        return tf.ensure_shape(value, spec.shape)
    if dtype in _AS_THEY_ARE:
        return tensor
    if dtype in _BITS:
        return tf.bitcast(tensor, dtype)
    if dtype == tf.complex128:
        return tf.complex(tensor[0], tensor[1])
    return tf.cast(tensor, dtype)
