"""Checks that all processes of a replica have traced the same step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import zip_longest

import tensorflow as tf

from opensmp.distributed.collectives.objects import allgather_objects
from opensmp.errors import StepError

_next_trace = 0


def agree(ranks: Sequence[int], what: str, lines: Sequence[str]) -> int:
    """Compares across processes a description of what each is about to run.

    Returns:
        A number that is the same in all of these processes and that none of them has had before.
    """
    global _next_trace
    digest = hashlib.sha256("\n".join([what, *lines]).encode("utf-8", "surrogatepass")).hexdigest()
    with tf.init_scope():
        known = allgather_objects((digest, _next_trace), ranks)
        number: int = max(trace for _, trace in known)
        _next_trace = number + 1
        if len({d for d, _ in known}) == 1:
            return number
        descriptions = allgather_objects((what, list(lines)), ranks)
    raise StepError(_difference(ranks, descriptions))


def _difference(ranks: Sequence[int], descriptions: Sequence[tuple[str, list[str]]]) -> str:
    """Error message with the first difference between the first process and another one."""
    (first_what, first), rank = descriptions[0], ranks[0]
    for other_rank, (what, lines) in zip(ranks[1:], descriptions[1:], strict=True):
        if what != first_what:
            where = f"rank {rank} traces {first_what}, rank {other_rank} traces {what}"
            break
        pairs = enumerate(zip_longest(first, lines, fillvalue="nothing"))
        found = next(((i, a, b) for i, (a, b) in pairs if a != b), None)
        if found is not None:
            number, expected, received = found
            where = (
                f"the first difference is in line {number + 1} of its plan:\n"
                f"    rank {rank}: {expected}\n    rank {other_rank}: {received}"
            )
            break
    return (
        "The processes do not run the same program, so that they would wait for each other for "
        f"ever. Expected: every rank traces the same steps with the same models, shapes and "
        f"configuration. Received: {where}\nLook for code that depends on the rank, on random "
        "numbers without a seed, or on the order of a set."
    )
