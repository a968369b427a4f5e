from __future__ import annotations

import numpy as np
import pytest
from processes import check_ranks

from opensmp.api.comm import communication
from opensmp.config import Config
from opensmp.distributed import world
from opensmp.distributed.world import CommGroup, RankType, World
from opensmp.errors import CommunicationError, NotInitializedError

BARRIERS = [communication.barrier, communication.mp_barrier, communication.dp_barrier]


def one_process() -> World:
    return World(config=Config(partitions=2), devices=("/device:CPU:0", "/device:CPU:1"))


def rank_5_of_8() -> World:
    """One of several processes that have not met."""
    return World(
        config=Config(partitions=2),
        devices=("/device:CPU:0",) * 2,
        rank=5,
        size=8,
        mp_group=(4, 5),
        dp_group=(1, 3, 5, 7),
    )


# ------------------------------------------------------------------------------ one process


def test_barriers_of_one_process_return_at_once():
    world.set_current(one_process())
    assert [barrier() for barrier in BARRIERS] == [None] * 3
    for group in CommGroup:
        assert communication.barrier(group) is None


def test_objects_of_one_process_stay_where_they_are():
    world.set_current(one_process())
    obj = object()
    assert communication.allgather(obj) == [obj]
    assert communication.broadcast(obj) is None


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("smp.barrier", communication.barrier),
        ("smp.allgather", lambda: communication.allgather(1)),
        ("smp.broadcast", lambda: communication.broadcast(1)),
        ("smp.send", lambda: communication.send(1, 0)),
        ("smp.recv_from", lambda: communication.recv_from(0)),
    ],
)
def test_calls_before_init_are_refused(name, call):
    with pytest.raises(NotInitializedError, match=f"{name} was used before smp.init"):
        call()


@pytest.mark.parametrize("group", ["WORLD", None, 0, RankType.WORLD_RANK])
def test_what_is_no_group_is_refused(group):
    world.set_current(one_process())
    for name in ("barrier", "broadcast", "allgather"):
        args = (group,) if name == "barrier" else (1, group)
        with pytest.raises(TypeError) as caught:
            getattr(communication, name)(*args)
        assert f"smp.{name}: group must be a member of smp.CommGroup: smp.WORLD" in str(
            caught.value
        )
        assert f"Received: {group!r} ({type(group).__name__})" in str(caught.value)


def test_what_is_no_rank_type_is_refused():
    world.set_current(one_process())
    with pytest.raises(TypeError, match=r"smp\.send: rank_type must be a member of smp\.RankType"):
        communication.send(1, 0, CommGroup.WORLD)


@pytest.mark.parametrize("rank", [-1, 2, True, "0"])
def test_rank_that_does_not_exist_is_refused(rank):
    world.set_current(rank_5_of_8())
    with pytest.raises(CommunicationError, match=r"no MP_RANK .* from 0 to 1, .* ranks \[4, 5\]"):
        communication.recv_from(rank, RankType.MP_RANK)


def test_message_to_itself_is_refused():
    world.set_current(rank_5_of_8())
    with pytest.raises(CommunicationError, match="DP_RANK 2 is this rank itself"):
        communication.send(1, 2, RankType.DP_RANK)


def test_nothing_passes_silently_without_the_other_members():
    world.set_current(rank_5_of_8())
    with pytest.raises(CommunicationError, match=r"smp\.barrier needs the ranks \[4, 5\]"):
        communication.mp_barrier()
    with pytest.raises(CommunicationError, match="opensmp run -n 2"):
        communication.send(1, 0)


# ------------------------------------------------------------------------- several processes


def test_objects_travel_between_four_ranks_in_two_replicas():
    check_ranks(
        """
        import numpy as np
        import opensmp as smp
        smp.init()
        import tensorflow as tf
        R = smp.RankType
        rank = smp.rank()
        assert (smp.size(), smp.mp_size(), smp.dp_size(), smp.local_size()) == (4, 2, 2, 4)
        assert smp.get_mp_group() == [[0, 1], [2, 3]][rank // 2]
        assert smp.get_dp_group() == [[0, 2], [1, 3]][rank % 2]

        # Any object, of different sizes on the ranks, larger than one packet.
        gathered = smp.allgather({"rank": rank, "text": "x" * 10_000 * rank})
        assert [g["rank"] for g in gathered] == [0, 1, 2, 3]
        assert [len(g["text"]) for g in gathered] == [0, 10_000, 20_000, 30_000]
        assert smp.allgather(rank, smp.MP_GROUP) == smp.get_mp_group()
        assert smp.allgather(rank, smp.DP_GROUP) == smp.get_dp_group()
        assert smp.allgather(rank, smp.TP_GROUP) == [rank]

        # Tensors and arrays.
        array = np.arange(300_000, dtype=np.float64)
        if rank == 2:
            smp.broadcast((array, tf.constant([1, 2])))
        else:
            received, tensor = smp.recv_from(2, R.WORLD_RANK)
            assert np.array_equal(received, array)
            assert tensor.numpy().tolist() == [1, 2]

        # Ranks counted in a group; both directions one after the other, several times.
        for turn in range(3):
            if smp.mp_rank() == 0:
                smp.send(("to", rank, turn), 1, R.MP_RANK)
                assert smp.recv_from(1, R.MP_RANK) == ("back", rank, turn)
            else:
                assert smp.recv_from(0, R.MP_RANK) == ("to", rank - 1, turn)
                smp.send(("back", rank - 1, turn), 0, R.MP_RANK)
        if smp.dp_rank() == 0:
            smp.broadcast(rank, smp.DP_GROUP)
        else:
            assert smp.recv_from(0, R.DP_RANK) == rank - 2

        from opensmp.distributed.collectives.objects import broadcast_object
        assert broadcast_object(["plan", rank], range(4), root=3) == ["plan", 3]
        smp.barrier(); smp.mp_barrier(); smp.dp_barrier()

        # A new configuration in the same cluster.
        smp.shutdown()
        smp.init({"partitions": 4, "processes_per_replica": 4, "placement_strategy": "spread"})
        assert smp.get_mp_group() == [0, 1, 2, 3]
        assert smp.allgather(rank, smp.DP_GROUP) == [rank]
        smp.barrier()
        """,
        4,
        {"partitions": 2},
    )


def test_barrier_waits_for_the_last():
    results = check_ranks(
        """
        import time
        import opensmp as smp
        smp.init()
        smp.barrier()
        time.sleep(1.5 * smp.rank())
        came = time.time()
        smp.barrier()
        times = smp.allgather((came, time.time()))
        assert min(left for _, left in times) >= max(came for came, _ in times)
        print("met")
        """,
        2,
    )
    assert [result.lines[-1] for result in results] == ["met", "met"]


def test_ranks_may_be_numbers_of_numpy():
    world.set_current(rank_5_of_8())
    with pytest.raises(CommunicationError, match="is this rank itself"):
        communication.send(1, np.int64(5))


def test_what_cannot_be_pickled_fails_on_both_sides_and_the_next_call_matches():
    check_ranks(
        """
        import opensmp as smp
        smp.init()
        import tensorflow as tf
        rank = smp.rank()

        def refused(call):
            try:
                call()
            except smp.CommunicationError as error:
                return str(error)

        bad = (lambda: None) if rank == 0 else 1
        text = refused(lambda: smp.allgather(bad))
        assert "smp.allgather: the object of rank 0, of type builtins.function" in text, text
        assert smp.allgather(rank) == [0, 1]
        if rank == 0:
            text = refused(lambda: smp.broadcast(bad))
            smp.broadcast("next")
        else:
            text = refused(lambda: smp.recv_from(0))
            assert smp.recv_from(0) == "next"
        assert "the object of rank 0" in text, text

        class Odd:
            def __reduce__(self):
                return int, ("x",)

        text = refused(lambda: smp.allgather(Odd() if rank else None))
        if rank == 0:
            assert "the object of rank 1 cannot be unpickled here (ValueError" in text, text

        @tf.function
        def traced(x):  # as all Python code of it, while it is traced
            smp.barrier()
            everyone = smp.allgather(rank)
            return x + sum(everyone)

        assert float(traced(tf.constant(1.0))) == 2.0
        text = refused(lambda: tf.function(lambda x: smp.allgather(x))(tf.ones([1])))
        assert "a tensor inside of a tf.function has no value yet" in text, text
        """,
        2,
    )
