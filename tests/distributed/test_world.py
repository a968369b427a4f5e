from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opensmp.config import Config
from opensmp.distributed import world
from opensmp.distributed.world import CommGroup, World
from opensmp.errors import ConfigError, NotInitializedError

RANKS = ["rank", "local_rank", "mp_rank", "dp_rank", "pp_rank", "tp_rank", "rdp_rank"]
SIZES = ["size", "local_size", "mp_size", "dp_size", "pp_size", "tp_size", "rdp_size"]
GROUPS = ["get_mp_group", "get_dp_group"]


def one_process(partitions: int = 2) -> World:
    return World(
        config=Config(partitions=partitions),
        devices=tuple(f"/device:CPU:{index}" for index in range(partitions)),
    )


def process(rank: int, size: int, partitions: int, placement_strategy: str) -> World:
    mp, dp = world.groups(size, partitions, placement_strategy)
    return World(
        config=Config(partitions=partitions, placement_strategy=placement_strategy),
        devices=("/device:CPU:0",),
        rank=rank,
        size=size,
        mp_group=next(group for group in mp if rank in group),
        dp_group=next(group for group in dp if rank in group),
    )


# ---------------------------------------------------------------------------------- groups


def test_cluster_makes_replicas_of_neighbours():
    mp, dp = world.groups(8, 2, "cluster")
    assert mp == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert dp == ((0, 2, 4, 6), (1, 3, 5, 7))


def test_spread_makes_replicas_of_distant_ranks():
    mp, dp = world.groups(8, 2, "spread")
    assert mp == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert dp == ((0, 1, 2, 3), (4, 5, 6, 7))


@pytest.mark.parametrize("strategy", ["cluster", "spread"])
def test_one_partition_is_pure_data_parallelism(strategy):
    assert world.groups(3, 1, strategy) == (((0,), (1,), (2,)), ((0, 1, 2),))


@pytest.mark.parametrize("strategy", ["cluster", "spread"])
def test_one_replica_is_pure_pipeline_parallelism(strategy):
    assert world.groups(3, 3, strategy) == (((0, 1, 2),), ((0,), (1,), (2,)))


@given(
    partitions=st.integers(1, 8),
    replicas=st.integers(1, 8),
    strategy=st.sampled_from(["cluster", "spread"]),
)
def test_every_rank_is_in_one_mp_and_one_dp_group_which_meet_in_it_alone(
    partitions, replicas, strategy
):
    size = partitions * replicas
    mp, dp = world.groups(size, partitions, strategy)
    assert sorted(sum(mp, ())) == sorted(sum(dp, ())) == list(range(size))
    assert {len(group) for group in mp} == {partitions}
    assert {len(group) for group in dp} == {replicas}
    assert all(len(set(one) & set(other)) == 1 for one in mp for other in dp)


@pytest.mark.parametrize(
    ("size", "partitions", "parts"),
    [
        (4, 3, ["partitions=3", "4 processes", "choose 1 or 2 or 4", "start 3 or 6 processes"]),
        (1, 2, ["partitions=2", "1 process:", "choose 1 partitions", "start 2 processes"]),
        (0, 1, ["0 processes", "1 or more"]),
        (4, 0, ["partitions=0", "1 or more"]),
    ],
)
def test_processes_that_are_no_whole_replicas_are_refused(size, partitions, parts):
    with pytest.raises(ConfigError) as caught:
        world.groups(size, partitions)
    for part in parts:
        assert part in str(caught.value)


def test_unknown_placement_strategy_is_refused():
    with pytest.raises(ConfigError, match="'sprawl' is unknown; accepted: 'cluster' or 'spread'"):
        world.groups(2, 1, "sprawl")


# -------------------------------------------------------------------- one process, and more


def test_one_process_is_rank_0_of_1_however_many_devices_it_has():
    world.set_current(one_process(partitions=4))
    assert [getattr(world, name)() for name in RANKS] == [0] * 7
    assert [getattr(world, name)() for name in SIZES] == [1] * 7
    assert [getattr(world, name)() for name in GROUPS] == [[0], [0]]


def test_rank_5_of_8_in_clusters_of_2():
    world.set_current(process(5, 8, 2, "cluster"))
    assert (world.rank(), world.size()) == (5, 8)
    assert (world.mp_rank(), world.mp_size(), world.get_mp_group()) == (1, 2, [4, 5])
    assert (world.dp_rank(), world.dp_size(), world.get_dp_group()) == (2, 4, [1, 3, 5, 7])
    assert (world.pp_rank(), world.pp_size()) == (1, 2)
    assert (world.rdp_rank(), world.rdp_size()) == (2, 4)
    assert (world.tp_rank(), world.tp_size()) == (0, 1)


def test_rank_5_of_8_spread_over_2():
    world.set_current(process(5, 8, 2, "spread"))
    assert (world.mp_rank(), world.get_mp_group()) == (1, [1, 5])
    assert (world.dp_rank(), world.get_dp_group()) == (1, [4, 5, 6, 7])


def test_groups_of_a_rank_are_copies():
    world.set_current(one_process())
    world.get_mp_group().append(7)
    assert world.get_mp_group() == [0]


def test_names_of_groups_are_the_members_of_comm_group():
    assert {name: getattr(world, name) for name in CommGroup.__members__} == dict(
        CommGroup.__members__
    )
    assert [member.name for member in world.RankType] == [
        "WORLD_RANK",
        "MP_RANK",
        "DP_RANK",
        "PP_RANK",
        "TP_RANK",
        "RDP_RANK",
    ]


# ---------------------------------------------------------------------------------- misuse


@pytest.mark.parametrize("name", RANKS + SIZES + GROUPS)
def test_before_init_the_error_names_the_call_and_shows_the_line_to_add(name):
    assert not world.is_initialized()
    with pytest.raises(NotInitializedError) as caught:
        getattr(world, name)()
    assert f"smp.{name} was used before smp.init" in str(caught.value)
    assert '    smp.init({"partitions": 2, "microbatches": 4})\n' in str(caught.value)


def test_clear_forgets_the_world():
    world.set_current(one_process())
    assert world.is_initialized()
    world.clear()
    world.clear()
    assert not world.is_initialized()


# ---------------------------------------------------------------------- replicas and partitions


@pytest.mark.parametrize(
    ("size", "partitions", "wanted", "expected"),
    [
        (1, 1, None, 1),
        (1, 4, None, 1),
        (4, 2, None, 2),
        (2, 4, None, 2),
        (4, 1, None, 1),
        (4, 4, 2, 2),
        (4, 4, 1, 1),
        (6, 2, 1, 1),
    ],
)
def test_processes_of_a_replica(size, partitions, wanted, expected):
    assert world.replica_size(size, partitions, wanted) == expected


@pytest.mark.parametrize(
    ("size", "partitions", "wanted", "parts"),
    [
        (4, 3, None, ["partitions=3 is not possible with 4 processes", "processes_per_replica to 1",
                      "choose 1, 2, 4 or 8 partitions", "start 3 or 6 processes"]),
        (6, 4, None, ["processes_per_replica to 1 or 2", "start 4 or 8 processes"]),
        (4, 4, 3, ["partitions=4 with processes_per_replica=3", "to 1, 2 or 4"]),
        (3, 2, 2, ["processes_per_replica=2 is not possible with 3 processes", "start 2 or 4 pro"]),
    ],
)  # fmt: skip
def test_processes_that_do_not_make_whole_replicas_are_refused_with_what_works(
    size, partitions, wanted, parts
):
    with pytest.raises(ConfigError) as caught:
        world.replica_size(size, partitions, wanted)
    for part in parts:
        assert part in str(caught.value)


def test_process_owns_consecutive_partitions():
    made = World(
        config=Config(partitions=6),
        devices=("/device:CPU:0",) * 6,
        rank=4,
        size=6,
        mp_group=(3, 4, 5),
        dp_group=(1, 4),
    )
    assert made.my_partitions == (2, 3)
    assert [made.partitions_of(mp_rank) for mp_rank in range(3)] == [(0, 1), (2, 3), (4, 5)]
    assert [made.owner(partition) for partition in range(6)] == [0, 0, 1, 1, 2, 2]


def test_one_process_owns_all_partitions():
    made = one_process(3)
    assert (made.my_partitions, made.owner(2)) == ((0, 1, 2), 0)


@pytest.mark.parametrize(
    ("ranks", "device", "expected"),
    [
        ((0, 1), "/device:CPU:0", True),
        ((0, 1), "/device:GPU:0", False),
        ((0,), "/device:CPU:0", False),
    ],
)
def test_cpus_of_several_processes_compute_to_send(ranks, device, expected):
    made = World(
        config=Config(partitions=2),
        devices=(device, "/device:CPU:0"),
        size=len(ranks),
        mp_group=ranks,
    )
    assert made.computes_to_send is expected
