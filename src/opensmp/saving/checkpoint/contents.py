"""Contents of a checkpoint, and the assignment of values to the processes that write them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Tensor
from opensmp.errors import CheckpointError

OBJECT_GRAPH = _private.OBJECT_GRAPH_KEY


class Value(NamedTuple):
    """A value to write.

    Attributes:
        name: Key in the files.
        slice_spec: Slice of a larger tensor that it is; "" for a whole tensor.
        read: Returns the tensor; None if there is no value yet.
    """

    name: str
    slice_spec: str
    read: Callable[[], Tensor | None]


class Place(NamedTuple):
    """Position of a process: the index of its replica of the model, and that in the replica."""

    replica: int
    member: int


@dataclass(frozen=True)
class Facts:
    """What each process gathers about the checkpoint of every other process.

    Attributes:
        place: Position of the process.
        keys: Sorted keys of all values, owned or not.
        elsewhere: Keys of variables whose current value is in another process.
    """

    place: Place
    keys: tuple[str, ...]
    elsewhere: frozenset[str]

    @property
    def digest(self) -> str:
        """Hash of the keys, to compare processes."""
        return hashlib.sha256("\n".join(self.keys).encode()).hexdigest()


class Contents:
    """The current values of a checkpoint in this process.

    Raises:
        CheckpointError: An object has a custom saver.
    """

    def __init__(self, checkpoint: Any, place: Place) -> None:
        self._values, self._object_graph = _private.checkpoint_values(checkpoint)
        self.facts = Facts(
            place,
            tuple(sorted(value.key for value in self._values)),
            frozenset(v.key for v in self._values if not _private.is_kept_here(v.owner)),
        )

    def share(self, all_facts: Sequence[Facts]) -> list[Value]:
        """The values that this process must write.

        If several processes have a value, the first of them writes it. The first replica writes
        all variables that it has, since all replicas have the same ones, and others write the
        optimizer's slots that only they have. The first process of another replica also writes the
        states of dataset iterators, because replicas read different data.
        """
        _check(all_facts)
        place = self.facts.place
        taken = _not_elsewhere([facts for facts in all_facts if facts.place < place])
        share = [
            Value(value.key, value.slice_spec, value.read)
            for value in self._values
            if value.key not in self.facts.elsewhere and value.key not in taken
        ]
        if place.replica:
            if place.member == 0:
                share += [
                    Value(of_replica(value.key, place.replica), value.slice_spec, value.read)
                    for value in self._values
                    if isinstance(value.owner, tf.data.Iterator)
                ]
            return share
        if place.member == 0:
            graph = self._object_graph
            share.append(Value(OBJECT_GRAPH, "", lambda: tf.constant(graph, tf.string)))
        return share


def of_replica(key: str, replica: int) -> str:
    """Key of a value that each replica has separately; the first replica uses the plain key."""
    return key if replica == 0 else f"replica-{replica}/{key}"


def is_variable(owner: Any) -> bool:
    """Whether an object of a checkpoint is a variable."""
    return isinstance(owner, (keras.Variable, tf.Variable))


def _not_elsewhere(all_facts: Sequence[Facts]) -> set[str]:
    return {key for facts in all_facts for key in set(facts.keys) - facts.elsewhere}


def _check(all_facts: Sequence[Facts]) -> None:
    """Raises if processes have different keys, or no process has some value."""
    first = all_facts[0]
    for rank, facts in enumerate(all_facts):
        if facts.digest != first.digest:
            ours, theirs = set(first.keys), set(facts.keys)
            only = [f"  only in rank 0: {key}" for key in sorted(ours - theirs)[:5]]
            only += [f"  only in rank {rank}: {key}" for key in sorted(theirs - ours)[:5]]
            raise CheckpointError(
                f"The checkpoints of rank 0 and of rank {rank} consist of different objects:\n"
                + "\n".join(only)
                + "\nGive tf.train.Checkpoint the same objects in all processes."
            )
    homeless = set(first.keys) - _not_elsewhere(all_facts)
    if homeless:
        raise CheckpointError(
            f"No process has a value for {', '.join(sorted(homeless)[:5])}. The variables have "
            "lost their memory: smp.init was called again since the model was partitioned."
        )
