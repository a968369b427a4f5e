"""Restores dataset iterators; each replica of the model has its own iterator state."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Tensor
from opensmp.errors import CheckpointError
from opensmp.saving.checkpoint.contents import of_replica
from opensmp.saving.checkpoint.restoring.object_matching import Match
from opensmp.saving.collective_errors import RankResult, result_of_error

_STATE = "_STATE"  # suffix of the state keys in the files; the objects' keys lack it


class Iterators:
    """The iterators of this process that have a state in a checkpoint.

    A state records how much an iterator has read. With a different number of replicas each replica
    reads a different shard of the data, so the states are meaningless and not restored.

    Attributes:
        keys: Keys of all iterators, as in the first replica.
        left_out: Reason why states are not restored; None if they are.
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

    def restore(self, states: Mapping[str, Tensor]) -> RankResult:
        """Sets the iterators to their saved states, given by the keys in `sources`."""
        for key, iterator in self._iterators.items():
            # Some datasets, such as Python generators, cannot save a state.
            with contextlib.suppress(tf.errors.OpError):
                self._before[key] = _private.iterator_state(iterator)
            try:
                _private.set_iterator_state(iterator, states[key])
            except tf.errors.OpError as error:
                return result_of_error(
                    CheckpointError(
                        f"The iterator at {key.partition('/.')[0]} cannot go on where it was: "
                        f"{error.message.splitlines()[0]}\nExpected: an iterator of the same "
                        "dataset. Make it as when the checkpoint was written, or leave it out of "
                        "tf.train.Checkpoint."
                    )
                )
        return RankResult()

    def undo(self) -> None:
        """Sets the iterators back to their states before `restore`."""
        for key, state in self._before.items():
            _private.set_iterator_state(self._iterators[key], state)


def _replicas_of(key: str, stored: Mapping[str, Any]) -> int:
    """Number of replicas that have saved a state of an iterator."""
    return next(n for n in itertools.count(1) if of_replica(key, n) not in stored)
