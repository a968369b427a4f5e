from __future__ import annotations

import pytest

from opensmp.compiler.cluster.cluster import Cluster
from opensmp.compiler.cluster.layout import Layout
from opensmp.compiler.cluster.links import LINKS, Link
from opensmp.compiler.plan.unit_graph import Machine
from opensmp.errors import PlanError


def test_links_are_those_of_the_device_unless_they_are_given():
    cluster = Cluster(2, 8, "H100")
    assert (cluster.device, cluster.inner) == ("h100", LINKS["nvlink4"])
    assert cluster.outer is LINKS["infiniband-hdr"]
    assert Cluster(2, 8, "h100", within="pcie5").inner is LINKS["pcie5"]
    assert Cluster(2, 8).inner is LINKS["pcie4"]
    assert Cluster(between=1e9).outer.bytes_per_second == 1e9
    assert cluster == Cluster(2, 8, "h100", within="nvlink4", between=LINKS["infiniband-hdr"])
    assert hash(cluster)


def test_cluster_is_printed_with_its_numbers():
    assert str(Cluster(512, 8, "h100", between="infiniband-ndr")) == (
        "4096 devices: 512 x 8 h100; within nvlink4 (450 GB/s x 0.8 + 5 µs), between "
        "infiniband-ndr (50 GB/s x 0.8 + 10 µs)"
    )
    assert "1 x 1 of 16 GiB; within" in str(Cluster(device={"memory": "16GiB"}))
    assert "as planned" in str(Cluster())


def test_all_faults_are_told_at_once():
    with pytest.raises(PlanError) as caught:
        Cluster(nodes=0, devices_per_node=True, device="h1", within="nvlink7", between=-1)
    for part in (
        "nodes is an integer from 1 to",
        "devices_per_node is",
        "device is 'v100'",
        "within: received 'nvlink7'",
        "bytes_per_second=-1",
    ):
        assert part in str(caught.value)


def test_machine_is_that_of_the_device():
    assert Cluster(device={"flops": 5e12}).machine(Machine(memory_bytes=7)) == Machine(
        flops_per_second=5e12, memory_bytes=7
    )


def test_ring_sends_twice_the_bytes_but_for_an_nth():
    link = Link("", 1e9, 0.0)
    group = Layout(Cluster(1, 8, within=link), 1, 8).replicas_of(0)
    assert group.all_reduce_seconds(1e9) == pytest.approx(2 * 7 / 8)
    assert group.gather_seconds(1e9) == pytest.approx(7 / 8)
    assert Layout(Cluster(1, 8, within=link), 8, 1).replicas_of(3).all_reduce_seconds(1e9) == 0


def test_rings_between_machines_use_the_links_of_all_their_devices():
    cluster = Cluster(4, 8, within=Link("", 100e9, 0.0), between=Link("", 1e9, 0.0))
    alone = Layout(cluster, 8, 4).replicas_of(0)  # one of each machine
    assert (alone.per_node, alone.nodes, alone.bytes_per_second) == (1, 4, 1e9)
    together = Layout(cluster, 4, 8, strategy="spread").replicas_of(0)
    assert (together.per_node, together.nodes, together.bytes_per_second) == (8, 1, 100e9)
    wide = Layout(cluster, 2, 16, strategy="spread").replicas_of(1)
    assert (wide.per_node, wide.nodes, wide.bytes_per_second) == (8, 2, 8e9)


def test_neighbours_of_a_replica_share_a_machine_unless_they_are_spread():
    cluster = Cluster(4, 8)
    near, far = Layout(cluster, 8, 4), Layout(cluster, 8, 4, strategy="spread")
    assert near.link(0, 7) == cluster.inner
    assert (far.link(0, 1), far.link(1, 2)) == (cluster.inner, cluster.outer)
    assert near.link(3, 3) is None
    crossing = Layout(cluster, 16, 2)
    assert (crossing.link(7, 8), crossing.link(8, 9)) == (cluster.outer, cluster.inner)
    assert Layout(cluster, 4, 1, width=8).link(0, 1) == cluster.outer
    assert (Layout(cluster, 1, 1, width=16).sharers.per_node) == 8


def test_cluster_that_is_too_small_is_refused():
    with pytest.raises(PlanError, match=r"4 partitions x 3 replicas need 12 devices.* has 8"):
        Layout(Cluster(1, 8), 4, 3)
