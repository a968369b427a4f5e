"""Synchronizes the processes of a run during `fit`: at each batch and at the end of the data.

All processes must read the same data and do the same with it. A process with other data, with
fewer batches, or one that stops on its own would make the others wait, or train on inputs and
labels that do not belong together. Therefore the processes compare what they are about to do.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.base.thread_values import ThreadValue
from opensmp.distributed import world
from opensmp.distributed.collectives import objects
from opensmp.errors import StepError
from opensmp.training.batch.batch_split import num_rows
from opensmp.training.sync.agreement import agreement
from opensmp.training.sync.fingerprint import fingerprint
from opensmp.training.sync.fit_settings import ONE_AHEAD, Settings, difference, different, digests

_NAME = "fit, evaluate or predict"

_BEGIN = f"begin a call of {_NAME}"

_DOING = {"train": "train", "test": "evaluate", "predict": "predict"}

_in_call = ThreadValue(False)


def is_shared() -> bool:
    """Whether there are several processes."""
    return world.is_initialized() and world.current("fit").size > 1


def meet(what: str, news: Any = None) -> list[Any]:
    """Checks that all processes are at the same point of `fit`; returns the `news` of all ranks.

    `what` comes next; it completes the sentence "rank 0 is about to". All raise an error if they
    differ.
    """
    if not is_shared():
        return [news]
    with tf.init_scope():
        # A rank that is at a batch asks so, and need not be told more if all others are.
        agreement.is_same(what, _NAME)
    return _gathered(what, news)


def _gathered(what: str, news: Any) -> list[Any]:
    here = world.current("fit")
    with tf.init_scope():
        found = objects.allgather_objects((what, news), range(here.size), _NAME)
    if len({other for other, _ in found}) > 1:
        raise StepError(_apart([other for other, _ in found]))
    return [other for _, other in found]


def meet_with(settings: Settings, what: str, news: Any = None) -> list[Any]:
    """Like `meet`, for processes that must have the same settings.

    Sends only digests of the settings, unless some differ.
    """
    if not is_shared():
        return [news]
    return _compared(settings, meet(what, (digests(settings), news)))


def _compared(settings: Settings, found: list[Any]) -> list[Any]:
    names = different([each for each, _ in found])
    if names:
        own = {name: settings[name] for name in names if name in settings}
        raise StepError(difference(names, meet("tell how their settings differ", own)))
    return [each for _, each in found]


def in_call() -> AbstractContextManager[None]:
    """Context of `fit`, `evaluate` or `predict`, which compare the settings for all batches."""
    return _in_call.set_to(True)


def is_in_call() -> bool:
    """Whether this thread is in a call of `fit`, `evaluate` or `predict`."""
    return _in_call.get()


def meet_at_batch(kind: str, data: Any, settings: Settings | None = None) -> None:
    """Checks that all processes are about to run the same batch.

    `kind` is `"train"`, `"test"` or `"predict"`. `settings` are compared too, for calls that are
    not within `fit`, `evaluate` or `predict`.
    """
    if not is_shared():
        return
    rows = num_rows(data)
    size = "a batch" if rows is None else f"a batch of {rows} examples"
    what, own, sent = f"{_DOING[kind]} on {size}", fingerprint(data), digests(settings or {})
    with tf.init_scope():
        if agreement.is_same(f"batch {(what, sent, own)}", _NAME):
            return
    prints = _compared(settings or {}, _gathered(what, (sent, own)))
    if len(set(prints)) > 1:
        raise StepError(_different(prints))


def meet_to_begin(settings: Settings) -> None:
    """Checks that all processes begin the same call of `evaluate` or `predict`."""
    meet_with(settings, _BEGIN)


def agree_on_chance(settings: Settings) -> int | None:
    """Begins a call of `fit`; sets Python's random state to that of rank 0 if they differ.

    Returns a seed for TensorFlow's shuffling, the same in all processes; None if the global seed is
    already the same in all of them.
    """
    if not is_shared():
        return None
    states = meet_with(settings, _BEGIN, (_private.global_seed(), random.getstate()))
    seeds = {seed for seed, _ in states}
    state = states[0][1]
    if any(other != state for _, other in states):
        random.setstate(state)
    if len(seeds) == 1 and None not in seeds:
        return None
    return random.Random(repr((states[0][0], state))).getrandbits(31)


def _apart(points: Sequence[str]) -> str:
    first = next(rank for rank, point in enumerate(points) if point != points[0])
    return (
        "The processes are not at the same point, so that they would wait for each other for ever. "
        f"Rank 0 is about to {points[0]}, rank {first} is about to {points[first]}. Expected: all "
        "of them get the same data, in batches of the same size and equally many, and stop at the "
        "same time. Give all of them the whole data: the batches are divided among the replicas "
        "inside, so that neither smp.shard nor a batch size of its own for each rank is needed. "
        f"{ONE_AHEAD}"
    )


def _different(prints: Sequence[str]) -> str:
    first = next(rank for rank, text in enumerate(prints) if text != prints[0])
    return (
        "The processes have different batches. Expected: the same whole batches in all of them, in "
        "the same order; they are divided among the replicas inside. Received, as types, shapes "
        f"and a checksum: {prints[0]} in rank 0, {prints[first]} in rank {first}. Give data as "
        "they were before smp.shard; a dataset or generator that shuffles needs the same seed "
        "everywhere, such as dataset.shuffle(1000, seed=0)."
    )
