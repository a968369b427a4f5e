"""Which devices of a cluster form replicas and partitions, and what links they share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from opensmp.compiler.cluster.cluster import Cluster
from opensmp.compiler.cluster.collectives import Group
from opensmp.compiler.cluster.links import Link
from opensmp.errors import PlanError


@dataclass(frozen=True)
class Layout:
    """The places of the partitions of all replicas.

    Ranks are numbered as `smp.init` does: with `placement_strategy="cluster"` the partitions of a
    replica are neighbours, with `"spread"` the replicas of a partition are.

    Attributes:
        cluster: The machines.
        partitions: Partitions of a replica.
        replicas: Number of replicas.
        width: Devices that share each partition; 1 for this library, see `Run.tensor_parallel`.
        strategy: `"cluster"` or `"spread"`.

    Raises:
        PlanError: If the cluster has too few devices.
    """

    cluster: Cluster
    partitions: int
    replicas: int
    width: int = 1
    strategy: str = "cluster"

    def __post_init__(self) -> None:
        needed = self.partitions * self.replicas * self.width
        if needed > self.cluster.num_devices:
            shared = f" x {self.width} devices each" if self.width > 1 else ""
            raise PlanError(
                f"Simulation: {self.partitions} partitions x {self.replicas} replicas{shared} need "
                f"{needed} devices, but the cluster has {self.cluster.num_devices}; simulate fewer "
                "replicas or partitions, or a larger cluster."
            )

    @cached_property
    def node(self) -> NDArray[np.int64]:
        """The machine of each partition of each replica, shape (partitions, replicas)."""
        p, r = np.ogrid[: self.partitions, : self.replicas]
        places = r * self.partitions + p
        if self.strategy == "spread":
            places = p * self.replicas + r
        return places * self.width // self.cluster.devices_per_node

    def link(self, source: int, target: int) -> Link | None:
        """The slowest link between two partitions in any replica; None within a partition."""
        if source == target:
            return None
        crosses = bool((self.node[source] != self.node[target]).any())
        return self.cluster.outer if crosses else self.cluster.inner

    @property
    def is_on_several_machines(self) -> bool:
        """Whether the partitions of some replica are on several machines."""
        return bool((self.node != self.node[:1]).any())

    def replicas_of(self, partition: int) -> Group:
        """The replicas of a partition."""
        nodes, counts = np.unique(self.node[partition], return_counts=True)
        return Group(self.cluster, self.replicas, int(counts.min()), len(nodes))

    @property
    def sharers(self) -> Group:
        """The devices that share a partition."""
        per_node = min(self.width, self.cluster.devices_per_node)
        return Group(self.cluster, self.width, per_node, -(-self.width // per_node))
