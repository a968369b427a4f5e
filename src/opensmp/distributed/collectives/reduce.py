"""All-reduce, gather and broadcast of tensors, eagerly and inside graphs.

In functions, sums of processes of one machine go through its memory, see `shared_sums`. All others
use TensorFlow's `CollectiveReduceV2` on the host of each process. In a graph, a reduce depends on
its own tensors only, so that it overlaps with the other work of the graph.

Keys pair the reduces of different processes, see `opensmp.distributed.collectives.keys`. A key
stands for a group, a dtype, a shape and the number of the use in its function: the first sum of a
float32 of shape [3, 4] in one process is paired with the first such sum in another. Functions
therefore match even if processes trace them a different number of times, as when one process has
received an odd batch.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Tensor
from opensmp.distributed.collectives.chunks import CHUNK_BYTES, chunk_sizes
from opensmp.distributed.collectives.gather import gather_by_rank
from opensmp.distributed.collectives.keys import instance_of_shape, registry
from opensmp.distributed.launch import cluster
from opensmp.distributed.transport import shared_sums
from opensmp.distributed.watchdog import recovery
from opensmp.distributed.watchdog.traced_calls import noted
from opensmp.errors import CommunicationError

BUCKET_BYTES = CHUNK_BYTES
"""Smaller neighbouring tensors of a call are fused up to this size, larger ones are split."""

_AS_THEY_ARE = (tf.bfloat16, tf.float16, tf.float32, tf.float64, tf.int32, tf.int64)
_WIDER = {
    tf.int8: tf.int32,
    tf.uint8: tf.int32,
    tf.int16: tf.int32,
    tf.uint16: tf.int32,
    tf.uint32: tf.int64,
}
_REAL = {tf.complex64: tf.float32, tf.complex128: tf.float64}

_NUM_SHOWN = 4  # tensors listed in messages

_counters: weakref.WeakKeyDictionary[Any, Counter[Any]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


class _Parcel(NamedTuple):
    """A tensor in a dtype that collectives can sum, and the inverse conversion.

    `divisor` is what the conversion divides by, if it does nothing else; None otherwise.
    """

    tensor: Tensor
    unpack: Callable[[Tensor], Tensor]
    divisor: int | None = None


def all_reduce(
    tensors: Sequence[Tensor], ranks: Sequence[int], *, mean: bool = False, name: str = "a sum"
) -> list[Tensor]:
    """All-reduces each tensor over the processes of a group by sum. All of them call it.

    Args:
        tensors: Dense numeric tensors; dtypes and shapes are the same in all processes.
        ranks: Participating ranks, ascending; includes this process.
        mean: Whether to divide by their number. The mean of integers is a float64.
        name: The call, for messages; the same in all processes.

    Returns:
        The sums, on the host.

    Raises:
        CommunicationError: A tensor is not numeric, or has an unknown number of dimensions.
    """
    members = tuple(ranks)
    if len(members) == 1 or not tensors:
        return [_divided(tensor, 1 if mean else None) for tensor in tensors]
    check_summable(tensors, name)
    with _call(name, members, tensors) as call:
        divisor = len(members) if mean else None
        parcels = [_parcel(tensor, divisor) for tensor in tensors]
        results: list[Tensor] = []
        for bucket in _buckets([parcel.tensor for parcel in parcels]):
            own = parcels[len(results) :][: len(bucket)]
            divisors = {parcel.divisor for parcel in own}
            divided = divisors.pop() if len(divisors) == 1 else None
            totals = _reduce_in_memory(bucket, call, divided)
            if totals is None:
                totals, divided = _reduce_bucket(bucket, call), None
            if divided is None:
                totals = [parcel.unpack(t) for parcel, t in zip(own, totals, strict=True)]
            results += totals
        return results


def gather_rows(tensor: Tensor, ranks: Sequence[int], *, name: str = "a gather") -> Tensor:
    """Concatenates a tensor of each process along the first axis, on the host. All of them call it.

    It is a float32, float64, int32 or int64 of a known shape, the same in all processes.
    """
    members = tuple(ranks)
    if len(members) == 1:
        return tensor
    with _call(name, members, [tensor]) as call:
        key = _Key.of(f"gather for {name}", tensor, members)
        rows = gather_by_rank(
            tensor, members, group=key.group, instance=key.instance, tokens=[key.token]
        )
        call.note(rows)
        return rows


def replace_by(
    tensors: Sequence[Tensor], ranks: Sequence[int], root: int, *, name: str = "a broadcast"
) -> list[Tensor]:
    """Broadcasts the tensors of one process, bit by bit. All processes call it.

    The bits are summed as integers, to which all processes but one contribute zeros. Unlike a
    broadcast operation, TensorFlow orders sums and never removes them from a graph.
    """
    members = tuple(ranks)
    if len(members) == 1:
        return list(tensors)
    is_root = cluster.needed(name, members).rank == root
    bits = [bits_of(tensor) for tensor in tensors]
    given = [t if is_root else tf.zeros_like(t) for t in bits]
    sums = all_reduce(given, members, name=f"{name} from rank {root}")
    return [from_bits(t, like) for t, like in zip(sums, tensors, strict=True)]


class _Call(NamedTuple):
    """A collective call in progress.

    Attributes:
        name: Its name, the same in all processes. It is part of the keys, so that calls of other
            names are not paired.
        members: The participating ranks.
        waiting: Collects the graph operations that wait for other ranks.
    """

    name: str
    members: tuple[int, ...]
    waiting: list[Any]

    def note(self, result: Tensor) -> None:
        """Records that an operation waits for other ranks."""
        if not tf.executing_eagerly():
            self.waiting.append(result.op)


@contextlib.contextmanager
def _call(name: str, members: tuple[int, ...], tensors: Sequence[Tensor]) -> Iterator[_Call]:
    """Places operations on this process's host, and logs the call while it is pending."""
    here = cluster.needed(name, members)
    what = f"{name} of {_looks(tensors)}"
    with tf.device(here.host):
        if tf.executing_eagerly():
            with recovery.entered(what, members):
                yield _Call(name, members, [])
        else:
            with noted(what, members, here.host) as waiting:
                yield _Call(name, members, waiting)


# ----------------------------------------------------------------------------------- buckets


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Groups neighbouring tensors of one dtype and known shape into buckets of `BUCKET_BYTES`."""
    buckets: list[list[Tensor]] = []
    filled = 0
    for tensor in tensors:
        size = _num_bytes(tensor)
        fits = buckets and size is not None and filled + size <= BUCKET_BYTES
        if fits and buckets[-1][0].dtype == tensor.dtype:
            buckets[-1].append(tensor)
            filled += size or 0
        else:
            buckets.append([tensor])
            filled = BUCKET_BYTES if size is None else size
    return buckets


def _reduce_in_memory(
    bucket: list[Tensor], call: _Call, divisor: int | None
) -> list[Tensor] | None:
    """In functions, sums through the shared memory of a machine; None if that is not possible.

    Divides the sums, too, while they are in the cache. Loops and branches may run in an order of
    their own, or not at all.
    """
    sums = shared_sums.current()
    if sums is None or tf.executing_eagerly():
        return None
    if not _private.is_of_function(tf.compat.v1.get_default_graph()):
        return None
    if not sums.can_sum(bucket, call.members):
        return None
    looks = [(tensor.dtype.name, tensor.shape.as_list()) for tensor in bucket]
    kind = f"shared sum for {call.name} of {looks}"
    key = repr((kind, call.members, _number((kind, call.members))))
    totals = sums.sum_up(bucket, call.members, key, divisor)
    if totals is not None:
        call.note(totals[0])
    return totals


def _reduce_bucket(bucket: list[Tensor], call: _Call) -> list[Tensor]:
    if len(bucket) == 1:
        return [_reduce_in_chunks(bucket[0], call)]
    flat = tf.concat([tf.reshape(tensor, [-1]) for tensor in bucket], 0)
    sizes = [tensor.shape.num_elements() for tensor in bucket]
    parts = tf.split(_reduce(flat, call, [t.shape.as_list() for t in bucket]), sizes)
    return [tf.reshape(p, t.shape) for p, t in zip(parts, bucket, strict=True)]


def _reduce_in_chunks(tensor: Tensor, call: _Call) -> Tensor:
    """In graphs, splits a large tensor into chunks that are sent concurrently."""
    size = _num_bytes(tensor)
    if size is None:
        return _reduce_of_unknown_shape(tensor, call)
    if size <= BUCKET_BYTES or tf.executing_eagerly():
        return _reduce(tensor, call)
    chunks = tf.split(tf.reshape(tensor, [-1]), chunk_sizes(tensor))
    sums = [_reduce(chunk, call, [tensor.shape.as_list()]) for chunk in chunks]
    return tf.reshape(tf.concat(sums, 0), tensor.shape)


def _reduce_of_unknown_shape(tensor: Tensor, call: _Call) -> Tensor:
    """Appends one element, because the collectives crash on empty tensors."""
    flat = tf.concat([tf.reshape(tensor, [-1]), tf.zeros([1], tensor.dtype)], 0)
    key = _Key.of(f"sum for {call.name}", tensor, call.members)
    total = tf.reshape(_reduce_by(key, flat, call)[:-1], tf.shape(tensor))
    total.set_shape(tensor.shape)
    return total


def _reduce(tensor: Tensor, call: _Call, shapes: Sequence[Any] = ()) -> Tensor:
    """The sum of a tensor of known shape.

    The `shapes` of the tensors that it consists of are part of the key, so that a bucket of other
    shapes, or in another order, is not paired.
    """
    if not tensor.shape.num_elements():
        return tf.identity(tensor)
    key = _Key.of(f"sum for {call.name} of {list(shapes)}", tensor, call.members)
    total = _reduce_by(key, tensor, call)
    total.set_shape(tensor.shape)
    return total


def _reduce_by(key: _Key, tensor: Tensor, call: _Call) -> Tensor:
    total = tf.raw_ops.CollectiveReduceV2(
        input=tensor,
        group_size=len(call.members),
        group_key=key.group,
        instance_key=key.instance,
        # Operations that share a token run in trace order, which only those with one key must.
        ordering_token=[key.token],
        merge_op="Add",
        final_op="Id",
        timeout_seconds=0,  # any other value leaves a thread behind
    )
    call.note(total)
    return total


# -------------------------------------------------------------------------------------- keys


class _Key(NamedTuple):
    """Group key, instance key and ordering token of one collective."""

    group: int
    instance: Any
    token: Tensor

    @classmethod
    def of(cls, kind: str, tensor: Tensor, members: tuple[int, ...]) -> _Key:
        """A key for this use, the same in all processes of the group."""
        shape = tuple(tensor.shape.as_list())
        number = _number((kind, members, tensor.dtype.name, shape))
        meaning = ("collective", kind, tensor.dtype.name, shape, number)
        if None not in shape:
            group = registry.group(members)
            instance = registry.instance(group, meaning)
            return cls(group, instance, _token(group, instance))
        # Instance keys made when the graph runs could equal those of another use: the tensor has a
        # group of its own, in which they represent shapes.
        group = registry.group(members, [repr(meaning)] * len(members))
        return cls(group, instance_of_shape(tf.shape(tensor)), _token(group, 0))


def _number(what: tuple[Any, ...]) -> int:
    """Number of such uses earlier in the function being traced; 0 outside functions."""
    if tf.executing_eagerly():
        return 0
    with _lock:
        counter = _counters.setdefault(tf.compat.v1.get_default_graph(), Counter())
        counter[what] += 1
        return counter[what] - 1


@functools.cache
def _token(group: int, instance: int) -> Tensor:
    """Resource by which TensorFlow orders the operations of one key."""
    with tf.init_scope():
        return tf.raw_ops.VarHandleOp(
            dtype=tf.int32, shape=[], shared_name=f"opensmp_token_{group}_{instance}"
        )


# ------------------------------------------------------------------------------------- types


def _parcel(tensor: Tensor, divisor: int | None) -> _Parcel:
    dtype = tensor.dtype
    if dtype in _AS_THEY_ARE:
        fused = divisor if dtype.is_floating else None
        return _Parcel(tensor, lambda total: _divided(total, divisor), fused)
    if dtype in _WIDER:
        wide = tf.cast(tensor, _WIDER[dtype])
        if divisor is None:
            return _Parcel(wide, lambda total: tf.cast(total, dtype))
        return _Parcel(wide, lambda total: _divided(total, divisor))
    if dtype == tf.uint64:
        bits = tf.bitcast(tensor, tf.int64)
        return _Parcel(bits, lambda total: _divided(tf.bitcast(total, dtype), divisor))
    parts = tf.stack([tf.math.real(tensor), tf.math.imag(tensor)])
    return _Parcel(parts, lambda total: _divided(tf.complex(total[0], total[1]), divisor))


def _divided(total: Tensor, count: int | None) -> Tensor:
    if count is None:
        return total
    if not (total.dtype.is_floating or total.dtype.is_complex):
        total = tf.cast(total, tf.float64)
    return total if count == 1 else total / tf.cast(count, total.dtype)


def bits_of(tensor: Tensor) -> Tensor:
    """The bits of a tensor as int32 or int64."""
    size = tensor.dtype.size
    if tensor.dtype in (tf.int32, tf.int64):
        return tensor
    if tensor.dtype == tf.bool or (tensor.dtype.is_integer and size < 4):
        return tf.cast(tensor, tf.int32)
    if tensor.dtype == tf.complex128:
        return tf.bitcast(tf.stack([tf.math.real(tensor), tf.math.imag(tensor)]), tf.int64)
    if size == 2:
        return tf.cast(tf.bitcast(tensor, tf.uint16), tf.int32)
    if size in (4, 8):
        return tf.bitcast(tensor, tf.int32 if size == 4 else tf.int64)
    raise CommunicationError(
        f"A tensor of dtype {tensor.dtype.name} cannot be sent to other processes. Expected: "
        "numbers or booleans."
    )


def from_bits(bits: Tensor, like: Any) -> Tensor:
    """Undoes `bits_of`, for a tensor of the dtype of `like`."""
    dtype = like.dtype
    if bits.dtype == dtype:
        return bits
    if dtype == tf.bool or (dtype.is_integer and dtype.size < 4):
        return tf.cast(bits, dtype)
    if dtype == tf.complex128:
        parts = tf.bitcast(bits, tf.float64)
        return tf.complex(parts[0], parts[1])
    if dtype.size == 2:
        return tf.bitcast(tf.cast(bits, tf.uint16), dtype)
    return tf.bitcast(bits, dtype)


# ------------------------------------------------------------------------------------ checks


def check_summable(tensors: Sequence[Tensor], name: str) -> None:
    """Checks that tensors can be all-reduced."""
    known = {*_AS_THEY_ARE, *_WIDER, *_REAL, tf.uint64}
    faults = []
    for index, tensor in enumerate(tensors):
        if tensor.dtype not in known:
            faults.append(f"tensor {index} has the dtype {tensor.dtype.name}")
        elif tensor.shape.rank is None:
            faults.append(f"tensor {index} has an unknown number of dimensions")
    if faults:
        raise CommunicationError(
            f"{name}: {'; '.join(faults)}. Expected: tensors of numbers with a known number of "
            "dimensions. Cast booleans to tf.int32, and give a tensor a rank with tf.ensure_shape."
        )


def _num_bytes(tensor: Tensor) -> int | None:
    if not tensor.shape.is_fully_defined():
        return None
    return int(tensor.shape.num_elements()) * int(tensor.dtype.size)


def _looks(tensors: Sequence[Tensor]) -> str:
    """Dtypes and shapes, for messages; the first few, then the number and checksum of the rest."""
    all_of_them = [f"{t.dtype.name} {t.shape.as_list()}" for t in tensors]
    shown, rest = all_of_them[:_NUM_SHOWN], all_of_them[_NUM_SHOWN:]
    more = f" and {len(rest)} more ({zlib.crc32(repr(rest).encode()):08x})" if rest else ""
    return ", ".join(shown) + more
