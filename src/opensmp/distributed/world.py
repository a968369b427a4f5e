"""The world of one process: its configuration, devices, rank and groups.

One process per rank. The ranks of an MP group hold a model replica, and each owns the same number
of consecutive partitions; the ranks of a DP group own the same partitions of different replicas.
Without a launcher one process owns all partitions: it is rank 0, every group is `[0]`, and every
size is 1, however many local devices its partitions use. Sizes count processes, not devices.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from opensmp.config import Config
from opensmp.errors import ConfigError, NotInitializedError


class CommGroup(enum.Enum):
    """The groups of ranks that a rank belongs to.

    There is no tensor parallelism: TP groups have one rank, PP groups are MP groups and RDP groups
    are DP groups.
    """

    WORLD = "world"
    MP_GROUP = "mp_group"
    DP_GROUP = "dp_group"
    PP_GROUP = "pp_group"
    TP_GROUP = "tp_group"
    RDP_GROUP = "rdp_group"


class RankType(enum.Enum):
    """Which ranks a rank number counts: those of the world, or of one of the groups."""

    WORLD_RANK = "world_rank"
    MP_RANK = "mp_rank"
    DP_RANK = "dp_rank"
    PP_RANK = "pp_rank"
    TP_RANK = "tp_rank"
    RDP_RANK = "rdp_rank"


WORLD = CommGroup.WORLD
MP_GROUP = CommGroup.MP_GROUP
DP_GROUP = CommGroup.DP_GROUP
PP_GROUP = CommGroup.PP_GROUP
TP_GROUP = CommGroup.TP_GROUP
RDP_GROUP = CommGroup.RDP_GROUP


class Groups(NamedTuple):
    """All groups of a world, in ascending order: an `mp` per replica, a `dp` per position in it."""

    mp: tuple[tuple[int, ...], ...]
    dp: tuple[tuple[int, ...], ...]


def groups(size: int, partitions: int, placement_strategy: str = "cluster") -> Groups:
    """Divides ranks into model replicas and data-parallel groups.

    `"cluster"` makes a replica of neighbouring ranks, `"spread"` of ranks as far apart as possible.
    """
    if size < 1 or partitions < 1 or size % partitions:
        raise ConfigError(
            f"Config: partitions={partitions} is not possible with {size} "
            f"process{'es' * (size != 1)}: the processes must make up whole replicas of the "
            f"model; {_ways_out(size, partitions)}"
        )
    if placement_strategy not in ("cluster", "spread"):
        raise ConfigError(
            f"Config: placement_strategy={placement_strategy!r} is unknown; accepted: 'cluster' "
            "or 'spread'"
        )
    replicas = size // partitions
    neighbours = partitions if placement_strategy == "cluster" else replicas
    blocks = tuple(tuple(range(start, start + neighbours)) for start in range(0, size, neighbours))
    across = tuple(tuple(range(start, size, neighbours)) for start in range(neighbours))
    if placement_strategy == "cluster":
        return Groups(mp=blocks, dp=across)
    return Groups(mp=across, dp=blocks)


def replica_size(size: int, partitions: int, wanted: int | None = None) -> int:
    """Number of processes that hold one replica of the model.

    Each of them owns `partitions / replica_size` partitions, so that it must divide both the number
    of partitions and the number of processes.

    Args:
        size: Number of processes.
        partitions: Number of partitions.
        wanted: The key `processes_per_replica`. None: one process per partition if that divides the
            processes, else one replica over all processes.
    """
    if wanted is not None and size % wanted == 0 and partitions % wanted == 0:
        return wanted
    if wanted is None and size % partitions == 0:
        return partitions
    if wanted is None and partitions % size == 0:
        return size
    given = f"partitions={partitions}"
    if wanted is not None:
        given += f" with processes_per_replica={wanted}"
    raise ConfigError(
        f"Config: {given} is not possible with {size} process{'es' * (size != 1)}: "
        "processes_per_replica must divide both numbers; set processes_per_replica to "
        f"{_either(n for n in range(1, size + 1) if size % n == 0 == partitions % n)}, or choose "
        f"{_either(_possible_partitions(size, wanted))} partitions, or start "
        f"{_either(_possible_sizes(size, partitions, wanted))} processes."
    )


def owned(partitions: int, processes: int, mp_rank: int) -> tuple[int, ...]:
    """The partitions of the process at a position of a replica."""
    each = partitions // processes
    return tuple(range(mp_rank * each, (mp_rank + 1) * each))


def _possible_partitions(size: int, wanted: int | None) -> list[int]:
    if wanted is not None and size % wanted == 0:
        return [wanted, 2 * wanted, 3 * wanted]
    return [count for count in range(1, size + 1) if size % count == 0] + [2 * size]


def _possible_sizes(size: int, partitions: int, wanted: int | None) -> list[int]:
    unit = wanted if wanted is not None and partitions % wanted == 0 else partitions
    below = size // unit * unit
    return [count for count in (below, below + unit) if count and count != size]


def _either(numbers: Iterable[int]) -> str:
    *first, last = [str(number) for number in numbers]
    return f"{', '.join(first)} or {last}" if first else last


def _ways_out(size: int, partitions: int) -> str:
    if size < 1 or partitions < 1:
        return "both must be 1 or more"
    divisors = [str(count) for count in range(1, size + 1) if size % count == 0]
    below = size // partitions * partitions
    multiples = [str(count) for count in (below, below + partitions) if count]
    return f"choose {' or '.join(divisors)} partitions, or start {' or '.join(multiples)} processes"


@dataclass(frozen=True, eq=False)
class World:
    """The settings, devices, rank and groups of a process after `smp.init`.

    Two worlds differ even if all of this is equal: what was compiled in one is stale in the other.

    Attributes:
        config: The configuration.
        devices: Logical device of each partition, by partition, such as `("/device:CPU:0",
            "/device:CPU:1")`. Partitions of other processes have `"/device:CPU:0"`, because nothing
            of them runs here.
        rank: Rank of this process among all.
        size: Number of processes.
        local_rank: Rank among the processes of this machine.
        local_size: Number of processes of this machine.
        mp_group: Ranks of this process's model replica.
        dp_group: Ranks that own the same partitions as this process.
        one_core_each: Whether each partition of this process has one CPU core to itself.
        nested_calls: How deep functions may call others in a partition that has one core to itself;
            see `opensmp.distributed.devices.nested_calls`.
        sums_early: Whether gradients are all-reduced over the replicas while the backward pass
            continues with earlier layers. Between CPUs of one machine this would only take time
            from the cores that compute.
        resident_bytes: Resident memory of this process at the end of `smp.init`.
    """

    config: Config
    devices: tuple[str, ...]
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    mp_group: tuple[int, ...] = (0,)
    dp_group: tuple[int, ...] = (0,)
    one_core_each: bool = False
    nested_calls: int = 0
    sums_early: bool = False
    resident_bytes: int = 0

    @property
    def my_partitions(self) -> tuple[int, ...]:
        """The partitions that this process owns, ascending."""
        return self.partitions_of(self.mp_group.index(self.rank))

    def partitions_of(self, mp_rank: int) -> tuple[int, ...]:
        """The partitions that the process at this position of a replica owns, ascending."""
        return owned(self.config.partitions, len(self.mp_group), mp_rank)

    def owner(self, partition: int) -> int:
        """The position in the replica of the process that owns this partition."""
        return partition // (self.config.partitions // len(self.mp_group))

    @property
    def computes_to_send(self) -> bool:
        """Whether the cores that compute also transfer tensors to partitions of other processes."""
        own = [self.devices[partition] for partition in self.my_partitions]
        return len(self.mp_group) > 1 and all("CPU" in device for device in own)

    def group(self, group: CommGroup) -> tuple[int, ...]:
        """Ranks of this process's group of this kind, ascending."""
        if group is CommGroup.WORLD:
            return tuple(range(self.size))
        if group is CommGroup.TP_GROUP:
            return (self.rank,)
        if group in (CommGroup.MP_GROUP, CommGroup.PP_GROUP):
            return self.mp_group
        return self.dp_group

    def rank_in(self, group: CommGroup) -> int:
        """Position of this process in its group of this kind, from 0."""
        return self.group(group).index(self.rank)


# ----------------------------------------------------------------------- the current world

_current: World | None = None


def set_current(world: World) -> None:
    """Sets the world that all functions below refer to."""
    global _current
    _current = world


def clear() -> None:
    """Unsets the current world; does nothing if there is none."""
    global _current
    _current = None


def is_initialized() -> bool:
    """Whether `smp.init` was called (and `smp.shutdown` was not called since).

    Example:
        ```python
        if not smp.is_initialized():
            smp.init({"partitions": 2})
        ```
    """
    return _current is not None


def current(what: str = "opensmp") -> World:
    """The current world."""
    if _current is None:
        raise NotInitializedError(
            f"{what} was used before smp.init. Expected: smp.init once, at the top of the "
            "script, before anything else of smp. Received: no configuration yet. Add, with "
            "the numbers you want:\n\n"
            '    smp.init({"partitions": 2, "microbatches": 4})\n'
        )
    return _current


# ----------------------------------------------------------------------------- public ranks


def rank() -> int:
    """Rank of this process among all processes, from 0."""
    return current("smp.rank").rank


def size() -> int:
    """Number of processes; 1 without a launcher, however many devices are used."""
    return current("smp.size").size


def local_rank() -> int:
    """Rank of this process among the processes of its machine, from 0."""
    return current("smp.local_rank").local_rank


def local_size() -> int:
    """Number of processes on this machine."""
    return current("smp.local_size").local_size


def mp_rank() -> int:
    """Rank of this process in its model replica, from 0."""
    return current("smp.mp_rank").rank_in(MP_GROUP)


def mp_size() -> int:
    """Number of processes that hold one replica of the model."""
    return len(current("smp.mp_size").group(MP_GROUP))


def dp_rank() -> int:
    """Rank of this process among those that own the same partitions, from 0."""
    return current("smp.dp_rank").rank_in(DP_GROUP)


def dp_size() -> int:
    """Number of model replicas."""
    return len(current("smp.dp_size").group(DP_GROUP))


def pp_rank() -> int:
    """Rank in the pipeline; the same as `mp_rank`."""
    return current("smp.pp_rank").rank_in(PP_GROUP)


def pp_size() -> int:
    """Number of processes of a pipeline; the same as `mp_size`."""
    return len(current("smp.pp_size").group(PP_GROUP))


def tp_rank() -> int:
    """Rank among tensor-parallel processes: 0, because there is no tensor parallelism."""
    return current("smp.tp_rank").rank_in(TP_GROUP)


def tp_size() -> int:
    """Number of tensor-parallel processes: 1, because there is no tensor parallelism."""
    return len(current("smp.tp_size").group(TP_GROUP))


def rdp_rank() -> int:
    """Rank among processes that hold the same parameters; the same as `dp_rank`."""
    return current("smp.rdp_rank").rank_in(RDP_GROUP)


def rdp_size() -> int:
    """Number of processes that hold the same parameters; the same as `dp_size`."""
    return len(current("smp.rdp_size").group(RDP_GROUP))


def get_mp_group() -> list[int]:
    """Ranks that hold this process's replica of the model, ascending.

    Example:
        ```python
        smp.get_mp_group()  # [0] in one process
        ```
    """
    return list(current("smp.get_mp_group").group(MP_GROUP))


def get_dp_group() -> list[int]:
    """Ranks that own the same partitions as this process, ascending."""
    return list(current("smp.get_dp_group").group(DP_GROUP))
