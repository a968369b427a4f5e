"""Iterators of datasets in a checkpoint: each replica of the model reads data of its own."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.errors import CheckpointError
from opensmp.saving.checkpoint.contents import of_replica
from opensmp.saving.checkpoint.restoring.object_matching import Match
from opensmp.saving.collective_errors import Outcome, outcome_of

Tensor = Any

_STATE = "_STATE"  # what the keys of states in the files end with, but not those of the objects


class Iterators:
    """The iterators of this process that have a state in a checkpoint.

    A state says how much an iterator has read. With another number of replicas each of them
    reads another share of the data, so that the states mean nothing: they are left out.

    Args:
        matches: Values in the files and their objects.
        stored: The keys in the files.
        replica: Number of this process's replica.
        replicas: Number of replicas.

    Attributes:
        keys: Keys of all iterators, by their name in the program.
        left_out: Why no state is read, None if there is no reason.
    """

    def __init__(
        self, matches: Sequence[Match], stored: Mapping[str, Any], replica: int, replicas: int
    ) -> None:
        found = {
            key + _STATE: owner
            for key, owner in matches
            if key + _STATE in stored and isinstance(owner, tf.data.Iterator)
        }
        wrote = {key: _replicas_of(key, stored) for key in found}
        other = {count for count in wrote.values() if count != replicas}
        self.keys = tuple(found)
        self.left_out: str | None = None
        if other:
            self.left_out = (
                f"it was written by {min(other)} replicas of the model, and here are {replicas}. "
                "Each reads another share of the data now, so that iterators of datasets are left "
                "as they are; Dataset.skip passes over what has been read."
            )
        self._iterators = {
            of_replica(key, replica): owner
            for key, owner in found.items()
            if wrote[key] == replicas
        }
        self._before: dict[str, Tensor] = {}

    @property
    def sources(self) -> tuple[str, ...]:
        """Keys of the states to read for this replica."""
        return tuple(self._iterators)

    def restore(self, states: Mapping[str, Tensor]) -> Outcome:
        """Brings the iterators to where they were.

        Args:
            states: A state for each of `sources`.
        """
        for key, iterator in self._iterators.items():
            # Of some datasets, such as Python's generators, no state can be told.
            with contextlib.suppress(tf.errors.OpError):
                self._before[key] = _private.iterator_state(iterator)
            try:
                _private.set_iterator_state(iterator, states[key])
            except tf.errors.OpError as error:
                return outcome_of(
                    CheckpointError(
                        f"The iterator at {key.partition('/.')[0]} cannot go on where it was: "
                        f"{error.message.splitlines()[0]}\nExpected: an iterator of the same "
                        "dataset. Make it as when the checkpoint was written, or leave it out of "
                        "tf.train.Checkpoint."
                    )
                )
        return Outcome()

    def undo(self) -> None:
        """Brings the iterators back to where they were before `restore`."""
        for key, state in self._before.items():
            _private.set_iterator_state(self._iterators[key], state)


def _replicas_of(key: str, stored: Mapping[str, Any]) -> int:
    """How many replicas have written a state of an iterator."""
    return next(n for n in itertools.count(1) if of_replica(key, n) not in stored)
