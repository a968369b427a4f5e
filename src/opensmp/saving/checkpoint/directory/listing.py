"""Determines which checkpoints of a directory are in use, from the state file and the files."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

from opensmp.saving.checkpoint.directory.manifest import History
from opensmp.saving.checkpoint.directory.names import parsed
from opensmp.saving.checkpoint.directory.state_file import State

_BEFORE_SECONDS = 1.0  # the margin of `tf.train.CheckpointManager`


class Listing(NamedTuple):
    """The checkpoints of one name in a directory, by number.

    Attributes:
        active: Checkpoints that `max_to_keep` counts and may remove, with their times, oldest
            first.
        order: All checkpoints that may be restored, newest first. Those missing from the state file
            come last.
        last_preserved: Start of the interval of `keep_checkpoint_every_n_hours`, in seconds since
            1970.
    """

    active: tuple[tuple[int, float], ...]
    order: tuple[int, ...]
    last_preserved: float

    @property
    def newest(self) -> int | None:
        """Number of the newest checkpoint; None if there is none."""
        return self.order[0] if self.order else None


def listing(
    name: str,
    state: State | None,
    present: Collection[int],
    history: Callable[[int], History | None],
    began: float,
) -> Listing:
    """Determines which checkpoints are in use.

    These are the checkpoints in the state file, as `tf.train.CheckpointManager` reads it, and one
    that was completed by a process that was killed before it wrote the state file. Without a state
    file, or if it belongs to another manager in the directory, they are those that have a manifest.
    """
    named = [] if state is None else [parsed(each, name) for each in state.names]
    if state is None or not any(each and not each.ending for each in named):
        return _without_state(present, history, began)
    active: dict[int, float] = {}
    listed: list[int] = []
    for position, each in enumerate(named):
        if each is None or each.ending:
            continue
        listed.append(each.number)
        if state.times:
            moment: float | None = state.times[position]
        else:
            known = history(each.number)
            moment = None if known is None else known.time
        # TensorFlow does not touch preserved checkpoints, nor those that `Checkpoint.save` wrote.
        if moment is not None and moment > state.last_preserved:
            active[each.number] = moment
    newest = listed[-1]
    for number in sorted(set(present) - set(listed)):
        known = history(number)
        if known is not None and not known.preserved and _is_next(known, name, number, newest):
            active[number] = known.time
            listed.append(number)
    rest = sorted(set(present) - set(listed))
    order = dict.fromkeys(reversed([*rest, *listed]))
    kept = tuple((number, moment) for number, moment in active.items() if number in present)
    return Listing(kept, tuple(order), state.last_preserved)


def _is_next(known: History, name: str, number: int, newest: int) -> bool:
    """Whether a checkpoint directly followed the newest one in the state file."""
    if known.after == "":  # manifest of an earlier version, in which numbers always increased
        return number > newest
    return known.after == f"{name}-{newest}"


def _without_state(
    present: Collection[int], history: Callable[[int], History | None], began: float
) -> Listing:
    known = {number: history(number) for number in sorted(present)}
    own = {number: each for number, each in known.items() if each is not None}
    active = tuple((number, each.time) for number, each in own.items() if not each.preserved)
    preserved = [each.time for each in own.values() if each.preserved]
    preserved += [own[number].last_preserved for number, _ in active[-1:]]
    if not any(preserved):
        preserved = [min([began, *(moment - _BEFORE_SECONDS for _, moment in active)])]
    return Listing(active, tuple(reversed(known)), max(preserved))
