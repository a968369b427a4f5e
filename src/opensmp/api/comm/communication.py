"""Public Python-object communication (send, receive, broadcast, all-gather) and barriers.

All calls are synchronous: they return once the peer has made the matching call, so all ranks must
make matching calls in the same order. Calls that can never match end the run with an error that
names the ranks instead of hanging. In a `tf.function` they run while it is traced, like all its
Python code, and not again when it executes.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

from opensmp.distributed.collectives import objects
from opensmp.distributed.world import DP_GROUP, MP_GROUP, WORLD, CommGroup, RankType, World, current
from opensmp.errors import CommunicationError

_GROUP_OF = {
    RankType.WORLD_RANK: CommGroup.WORLD,
    RankType.MP_RANK: CommGroup.MP_GROUP,
    RankType.DP_RANK: CommGroup.DP_GROUP,
    RankType.PP_RANK: CommGroup.PP_GROUP,
    RankType.TP_RANK: CommGroup.TP_GROUP,
    RankType.RDP_RANK: CommGroup.RDP_GROUP,
}


def broadcast(obj: Any, group: CommGroup = WORLD) -> None:
    """Sends an object to all other ranks of a group, which must call `recv_from`.

    Args:
        obj: Any picklable object, tensors included.
        group: A group that contains this rank, such as `smp.WORLD`.

    Raises:
        NotInitializedError: `smp.init` has not been called.
        TypeError: `group` is not a `CommGroup`.

    Example:
        ```python
        if smp.rank() == 0:
            smp.broadcast(vocabulary, smp.WORLD)
        else:
            vocabulary = smp.recv_from(0, smp.RankType.WORLD_RANK)
        ```
    """
    world = current("smp.broadcast")
    members = members_of("smp.broadcast", world, group)
    others = [rank for rank in members if rank != world.rank]
    objects.send_object(obj, others, "smp.broadcast")


def send(obj: Any, dest_rank: int, rank_type: RankType = RankType.WORLD_RANK) -> None:
    """Sends an object to another rank, which must call `recv_from`.

    Args:
        obj: Any picklable object, tensors included.
        dest_rank: The receiving rank.
        rank_type: How `dest_rank` is numbered, such as `smp.RankType.MP_RANK`.

    Raises:
        NotInitializedError: `smp.init` has not been called.
        CommunicationError: There is no such rank, or it is this rank itself.
        TypeError: `rank_type` is not a `RankType`.

    Example:
        ```python
        if smp.mp_rank() == 0:
            smp.send("hello", 1, smp.RankType.MP_RANK)
        elif smp.mp_rank() == 1:
            text = smp.recv_from(0, smp.RankType.MP_RANK)
        ```
    """
    objects.send_object(obj, [_other_rank("smp.send", dest_rank, rank_type)], "smp.send")


def recv_from(src_rank: int, rank_type: RankType = RankType.WORLD_RANK) -> Any:
    """Receives the next object that another rank sends with `send` or `broadcast`.

    Args:
        src_rank: The sending rank.
        rank_type: How `src_rank` is numbered, such as `smp.RankType.MP_RANK`.

    Raises:
        NotInitializedError: `smp.init` has not been called.
        CommunicationError: There is no such rank, or it is this rank itself.
        TypeError: `rank_type` is not a `RankType`.

    Example:
        See `broadcast` and `send`.
    """
    source = _other_rank("smp.recv_from", src_rank, rank_type)
    return objects.recv_object(source, "smp.recv_from")


def allgather(obj: Any, group: CommGroup = WORLD) -> list[Any]:
    """Gathers one object from each rank of a group; every rank gets all of them.

    Args:
        obj: Any picklable object, tensors included.
        group: A group that contains this rank, such as `smp.DP_GROUP`.

    Returns:
        The objects, in the order of the ranks in the group.

    Raises:
        NotInitializedError: `smp.init` has not been called.
        TypeError: `group` is not a `CommGroup`.

    Example:
        ```python
        losses = smp.allgather(float(loss), smp.DP_GROUP)
        ```
    """
    world = current("smp.allgather")
    members = members_of("smp.allgather", world, group)
    return objects.allgather_objects(obj, members, "smp.allgather")


def barrier(group: CommGroup = WORLD) -> None:
    """Blocks until every process of the group has called it.

    In a group of one process it returns immediately.

    Args:
        group: The group to synchronize, such as `smp.MP_GROUP`.

    Raises:
        NotInitializedError: `smp.init` has not been called.
        TypeError: `group` is not a `CommGroup`.

    Example:
        ```python
        smp.barrier()
        smp.barrier(smp.DP_GROUP)
        ```
    """
    _meet("smp.barrier", group)


def mp_barrier() -> None:
    """Blocks until all processes of this model replica have called it."""
    _meet("smp.mp_barrier", MP_GROUP)


def dp_barrier() -> None:
    """Blocks until all processes that own the same partitions, one per replica, have called it."""
    _meet("smp.dp_barrier", DP_GROUP)


def _meet(what: str, group: CommGroup) -> None:
    members = members_of(what, current(what), group)
    # All barriers share one operation name, so that different groups with the same ranks match.
    objects.meet(members, "smp.barrier")


def members_of(what: str, world: World, group: CommGroup) -> tuple[int, ...]:
    """World ranks of a group of this process; raises `TypeError` for anything but a `CommGroup`."""
    if not isinstance(group, CommGroup):
        known = ", ".join(f"smp.{member.name}" for member in CommGroup)
        raise TypeError(
            f"{what}: group must be a member of smp.CommGroup: {known}. Received: {group!r} "
            f"({type(group).__name__})."
        )
    return world.group(group)


def index_of(what: str, name: str, rank: Any, members: tuple[int, ...]) -> int:
    """Validates a rank within a group and returns it as an `int`; accepts NumPy integers.

    Raises:
        CommunicationError: The group has no such rank.
    """
    whole = isinstance(rank, Integral) and not isinstance(rank, bool)
    if not whole or not 0 <= rank < len(members):
        raise CommunicationError(
            f"{what}: there is no {name} {rank!r}. Expected: an integer from 0 to "
            f"{len(members) - 1}, for this group has the ranks {list(members)}."
        )
    return int(rank)


def _other_rank(what: str, rank: int, rank_type: RankType) -> int:
    """Converts a rank of type `rank_type` to a world rank; rejects this rank itself."""
    world = current(what)
    if not isinstance(rank_type, RankType):
        known = ", ".join(f"smp.RankType.{member.name}" for member in RankType)
        raise TypeError(
            f"{what}: rank_type must be a member of smp.RankType: {known}. Received: "
            f"{rank_type!r} ({type(rank_type).__name__})."
        )
    members = world.group(_GROUP_OF[rank_type])
    rank = index_of(what, rank_type.name, rank, members)
    if members[rank] == world.rank:
        raise CommunicationError(
            f"{what}: {rank_type.name} {rank} is this rank itself, which would wait for ever. "
            "Expected: another rank. A usual pattern is `if smp.rank() == 0: smp.broadcast(obj) "
            "else: obj = smp.recv_from(0)`."
        )
    return members[rank]
