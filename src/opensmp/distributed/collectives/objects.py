"""Transfers Python objects between processes over TensorFlow's collectives.

An object is pickled and sent as int64 words, since collectives do not support bytes. A collective
has a fixed shape, so that a first packet of 4 KiB carries the length, the sending rank and the
beginning, and the rest follows in pieces whose sizes are powers of two. Everything runs eagerly,
even while a function is being traced, and returns when the object has arrived; all ranks of a group
must make the same calls. If pickling fails, the waiting ranks receive the error and fail as well,
so that later calls still match.

Unpickling runs code of the sender: processes must be trusted, see the documentation.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from opensmp.distributed.collectives import keys
from opensmp.distributed.collectives.gather import gather_by_rank
from opensmp.distributed.launch import cluster
from opensmp.distributed.watchdog import recovery
from opensmp.errors import CommunicationError

_HEAD_WORDS = 512
_LENGTH, _SENDER, _BEGINNING = 0, 1, 2  # word indices in the first packet
_HEAD_BYTES = (_HEAD_WORDS - _BEGINNING) * 8
_SMALLEST, _LARGEST = 10, 23  # exponents of piece sizes in words: 8 KiB to 64 MiB

Ranks = Sequence[int]
Words = Any


def allgather_objects(obj: Any, ranks: Ranks, name: str = "allgather_objects") -> list[Any]:
    """Gathers one object from each rank, in rank order; this process's own one is not copied."""
    members = tuple(ranks)
    if len(members) == 1:
        return [obj]
    here, data = cluster.needed(name, members), _Pickled.of(obj)
    with tf.init_scope(), recovery.entered(name, members), tf.device(here.host):
        head = _head(data, here.rank)
        heads = _gather(head, members).numpy().reshape(len(members), _HEAD_WORDS)
        _check_senders(heads[:, _SENDER], members, name)
        lengths = [abs(int(length)) for length in heads[:, _LENGTH]]
        texts = [_beginning(head) for head in heads]
        for begin, power in _pieces(max(lengths)):
            rows = _gather(_piece(data.text, begin, power), members).numpy()
            for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
                piece = rows.reshape(len(members), -1)[row].view(np.uint8)
                text += piece[: max(0, length - begin)].tobytes()
    for member, text, length in zip(members, texts, heads[:, _LENGTH], strict=True):
        _check_pickled(bytes(text), int(length), member, name)
    return [
        obj if member == here.rank else _loaded(bytes(text), member, name)
        for member, text in zip(members, texts, strict=True)
    ]


def broadcast_object(
    obj: Any, ranks: Ranks, root: int, name: str = "broadcast_object"
) -> Any:  # fmt: skip
    """Broadcasts an object from one rank to all, which all call it; on `root` it is not copied."""
    members = tuple(ranks)
    if len(members) == 1:
        return obj
    here = cluster.needed(name, members)
    data = _Pickled.of(obj) if here.rank == root else None
    what = f"{name} from rank {root}"
    with tf.init_scope(), recovery.entered(what, members), tf.device(here.host):
        received = _transfer(data, members, root, name)
    return obj if received is None else _loaded(received, root, name)


def send_object(obj: Any, destinations: Ranks, name: str = "send_object") -> None:
    """Sends an object to other ranks; returns when all of them have received it."""
    data = _Pickled.of(obj)
    for destination in destinations:
        _message(data, None, destination, name)
    if destinations:
        here = cluster.needed(name, None).rank
        _check_pickled(data.text, -1 if data.failed else 0, here, name)


def recv_object(source: int, name: str = "recv_object") -> Any:
    """Receives the next object that another rank sends to this one."""
    received = _message(None, source, None, name)
    assert received is not None
    return _loaded(received, source, name)


def meet(ranks: Ranks, name: str = "meet") -> None:
    """Barrier: returns when all ranks have called it."""
    members = tuple(ranks)
    if len(members) == 1:
        return
    here = cluster.needed(name, members)
    group = keys.registry.group(members)
    with tf.init_scope(), recovery.entered(name, members), tf.device(here.host):
        tf.raw_ops.CollectiveReduceV2(
            input=tf.zeros([1], tf.int32),
            group_size=_number(len(members)),
            group_key=_number(group),
            instance_key=_number(keys.registry.instance(group, ("object", "meet"))),
            ordering_token=[],
            merge_op="Add",
            final_op="Id",
            timeout_seconds=0,  # any other value leaves a thread behind
        ).numpy()


# ----------------------------------------------------------------------------------- pickles


class _Pickled(NamedTuple):
    """A pickled object, or the text of the error if pickling failed."""

    text: bytes
    failed: bool

    @classmethod
    def of(cls, obj: Any) -> _Pickled:
        try:
            return cls(pickle.dumps(obj, protocol=5), failed=False)
        except Exception as error:  # the object's own code may raise anything
            kind = type(obj)
            return cls(
                f"of type {kind.__module__}.{kind.__qualname__} cannot be pickled "
                f"({type(error).__name__}: {error})".encode("utf-8", "backslashreplace"),
                failed=True,
            )


def _check_pickled(text: bytes, length: int, rank: int, name: str) -> None:
    """Raises the error that a rank sent instead of an object, marked by a negative length."""
    if length < 0:
        raise CommunicationError(
            f"{name}: the object of rank {rank}, {text.decode()}. Expected: an object that pickle "
            "can take apart, such as numbers, texts, arrays, tensors and containers of these. "
            "Functions must be those of a module, and a tensor inside of a tf.function has no "
            "value yet: call it outside."
        )


def _check_senders(found: Sequence[Any], expected: Ranks, name: str) -> None:
    """Raises if TensorFlow delivered objects in an order other than expected."""
    senders = [int(rank) for rank in found]
    if senders != list(expected):
        raise CommunicationError(
            f"{name}: TensorFlow delivered the objects of the ranks {senders} in this order. "
            f"Expected: {list(expected)}. TensorFlow {tf.__version__} counts processes in another "
            "way than opensmp knows. Use a version of TensorFlow that this version of opensmp "
            "supports, or fewer than eleven processes."
        )


def _loaded(text: bytes, rank: int, name: str) -> Any:
    try:
        return pickle.loads(text)
    except Exception as error:
        raise CommunicationError(
            f"{name}: the object of rank {rank} cannot be unpickled here ({type(error).__name__}: "
            f"{error}). Expected: that what it is made of can be imported on all ranks."
        ) from error


# ------------------------------------------------------------------------------- collectives


def _message(
    data: _Pickled | None, source: int | None, destination: int | None, call: str
) -> bytes | None:
    """Transfers one object from rank to rank; `data` is given on the sending side."""
    what = f"a message {'from' if data is None else 'to'} rank {source or destination or 0}"
    here = cluster.needed(what, None)
    rank = here.rank
    begin, end = (
        (rank if source is None else source),
        (rank if destination is None else destination),
    )
    if begin == end:
        raise CommunicationError(
            f"Rank {rank} cannot exchange a message with itself: it would wait for ever. Received: "
            f"rank {begin}. Expected: another rank."
        )
    members = (min(begin, end), max(begin, end))
    name = f"a message from rank {begin} to rank {end}"
    with tf.init_scope(), recovery.entered(name, members, f"{begin}>{end}"), tf.device(here.host):
        return _transfer(data, members, begin, call)


def _transfer(
    data: _Pickled | None, members: tuple[int, ...], root: int, name: str
) -> bytes | None:
    """Sends first packet and pieces from the root, which passes `data`; the others return them."""
    if data is not None:
        _send(_head(data, root), members, root)
        for begin, power in _pieces(len(data.text)):
            _send(_piece(data.text, begin, power), members, root)
        return None
    head = _receive(_HEAD_WORDS, members, root).numpy()
    _check_senders(head[_SENDER : _SENDER + 1], (root,), name)
    length, text = abs(int(head[_LENGTH])), bytearray(_beginning(head))
    for begin, power in _pieces(length):
        piece = _receive(1 << power, members, root).numpy().view(np.uint8)
        text += piece[: length - begin].tobytes()
    _check_pickled(bytes(text), int(head[_LENGTH]), root, name)
    return bytes(text)


def _keys(members: tuple[int, ...], kind: str, words: int, root: int | None) -> dict[str, Any]:
    group = keys.registry.group(members)
    instance = keys.registry.instance(group, ("object", kind, words, root))
    return {
        "group_size": _number(len(members)),
        "group_key": _number(group),
        "instance_key": _number(instance),
        "timeout_seconds": 0,  # any other value leaves a thread behind
    }


def _send(words: Words, members: tuple[int, ...], root: int) -> None:
    numbers = _keys(members, "broadcast", len(words), root)
    tf.raw_ops.CollectiveBcastSendV2(input=tf.constant(words), **numbers).numpy()


def _receive(words: int, members: tuple[int, ...], root: int) -> Any:
    numbers = _keys(members, "broadcast", words, root)
    return tf.raw_ops.CollectiveBcastRecvV2(
        T=tf.int64, shape=tf.constant([words], tf.int32), **numbers
    )


def _gather(words: Words, members: tuple[int, ...]) -> Any:
    numbers = _keys(members, "gather", len(words), None)
    group, instance = numbers["group_key"], numbers["instance_key"]
    return gather_by_rank(tf.constant(words), members, group=group, instance=instance)


@functools.lru_cache(maxsize=4096)
def _number(value: int) -> Any:
    with tf.init_scope():
        return tf.constant(value, tf.int32)


# ------------------------------------------------------------------------------------- words


def _head(data: _Pickled, sender: int) -> Words:
    words = np.zeros(_HEAD_WORDS, np.int64)
    words[_LENGTH] = -len(data.text) if data.failed else len(data.text)
    words[_SENDER] = sender
    beginning = np.frombuffer(data.text[:_HEAD_BYTES], np.uint8)
    words[_BEGINNING:].view(np.uint8)[: len(beginning)] = beginning
    return words


def _beginning(head: Words) -> bytearray:
    text = head[_BEGINNING:].view(np.uint8)
    return bytearray(text[: abs(int(head[_LENGTH]))].tobytes())


def _pieces(length: int) -> Iterator[tuple[int, int]]:
    """Start offset in bytes of each piece after the first packet, and its exponent in words."""
    begin = _HEAD_BYTES
    while begin < length:
        words = -(-(length - begin) // 8)
        power = min(_LARGEST, max(_SMALLEST, (words - 1).bit_length()))
        yield begin, power
        begin += 8 << power


def _piece(data: bytes, begin: int, power: int) -> Words:
    words = np.zeros(1 << power, np.int64)
    part = np.frombuffer(data, np.uint8)[begin : begin + (8 << power)]
    words.view(np.uint8)[: len(part)] = part
    return words
