"""Time of operations of many devices at once: sums of gradients, gathered weights."""

from __future__ import annotations

import math
from typing import NamedTuple

from opensmp.compiler.cluster.cluster import Cluster


class Group(NamedTuple):
    """Devices that sum or gather tensors together.

    Attributes:
        cluster: Their cluster.
        size: Number of devices.
        per_node: Devices of the group in each of its machines.
        nodes: Number of its machines.
    """

    cluster: Cluster
    size: int
    per_node: int
    nodes: int

    @property
    def bytes_per_second(self) -> float:
        """What a device of the group sends at once.

        Between machines, rings go through the links of all devices of the group in a machine.
        """
        inner = self.cluster.inner.reached_bytes_per_second
        if self.nodes == 1:
            return inner
        outer = self.per_node * self.cluster.outer.reached_bytes_per_second
        return outer if self.per_node == 1 else min(inner, outer)

    def all_reduce_seconds(self, num_bytes: float) -> float:
        """Returns the time until each device has the sum of `num_bytes` of each.

        In rings, a device sends 2 (n - 1) / n times the bytes (Patarasuk and Yuan, "Bandwidth
        Optimal All-reduce Algorithms for Clusters of Workstations", 2009); the latencies are those
        of a tree, as NCCL takes one where there are many.
        """
        return 2 * self.gather_seconds(num_bytes)

    def gather_seconds(self, num_bytes: float) -> float:
        """Returns the time until each device has all parts of `num_bytes`, or its part of sums."""
        if self.size <= 1 or num_bytes <= 0:
            return 0.0
        link = self.cluster.inner if self.nodes == 1 else self.cluster.outer
        sent = (self.size - 1) / self.size * num_bytes
        return sent / self.bytes_per_second + math.ceil(math.log2(self.size)) * link.latency_seconds
