from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from sharing import transfer
from simulated import GROUPS, SimulatedRanks, by_name

import opensmp
from opensmp.distributed.collectives import consistency, objects, reduce
from opensmp.distributed.collectives import gather as gathering
from opensmp.distributed.collectives.gather import gather_by_rank, tasks_in_order
from opensmp.distributed.collectives.sparse import slices_of_all
from opensmp.distributed.launch import cluster
from opensmp.distributed.transport.shared_memory import rooms, share
from opensmp.errors import CommunicationError, SavingError, StepError
from opensmp.saving import gather, own_weights
from opensmp.saving.models import same_file
from opensmp.training.sync import sync

LARGE = 20_000  # bytes of an object that does not fit in the first packet


@pytest.fixture(params=GROUPS, ids=str)
def simulation(request, monkeypatch):
    return SimulatedRanks(monkeypatch, request.param)


@pytest.fixture
def world_of_12(monkeypatch):
    return SimulatedRanks(monkeypatch, range(12))


def raised(results, kind):
    """The messages of all ranks, each of which must have raised such an error."""
    assert all(isinstance(result, kind) for result in results.values()), results
    return [str(result) for result in results.values()]


# ------------------------------------------------------------------------------- the order


@given(ranks=st.sets(st.integers(0, 20_000), min_size=1, max_size=20))
def test_tensorflow_counts_processes_by_the_texts_of_their_names(ranks):
    ascending = tuple(sorted(ranks))
    assert list(tasks_in_order(ascending)) == by_name(ascending)


@given(ranks=st.sets(st.integers(0, 20_000), min_size=2, max_size=20))
def test_what_lies_in_the_order_of_tensorflow_comes_in_the_order_of_the_ranks(ranks):
    ascending = tuple(sorted(ranks))
    where = gathering._where_each_is(ascending)
    rows = np.array(by_name(ascending))
    assert (rows if where is None else rows[where]).tolist() == list(ascending)


def test_up_to_ten_ranks_nothing_is_moved():
    assert all(gathering._where_each_is(tuple(range(n))) is None for n in range(2, 11))
    assert gathering._where_each_is(tuple(range(11))) is not None


def test_only_one_file_names_the_collectives_whose_result_depends_on_an_order():
    found = {
        path.name
        for path in Path(opensmp.__file__).parent.rglob("*.py")
        if re.search(r"Collective(Gather|ReduceScatter|AllToAll)\w*\(", path.read_text())
    }
    assert found == {"gather.py"}


# ------------------------------------------------------------------------- every operation


def test_tensors_lie_in_the_order_of_the_ranks(simulation):
    def work(rank):
        own = tf.constant([[rank, 0], [rank, 1]])
        key = {"group": 5, "instance": 6}
        return gather_by_rank(own, simulation.ranks, **key).numpy().tolist()

    expected = [[rank, row] for rank in simulation.ranks for row in (0, 1)]
    assert simulation(work) == dict.fromkeys(simulation.ranks, expected)


@pytest.mark.parametrize("ranks", GROUPS, ids=str)
def test_rows_of_a_graph_lie_in_the_order_of_the_ranks(monkeypatch, ranks):
    def gathered(input, **_):
        return tf.concat([input + float(rank - own) for rank in by_name(ranks)], 0)

    monkeypatch.setattr(tf.raw_ops, "CollectiveGatherV2", gathered)
    for own in ranks:
        here = SimpleNamespace(rank=own, host="/device:CPU:0")
        monkeypatch.setattr(cluster, "needed", lambda *_, here=here: here)

        @tf.function
        def rows(x):
            return reduce.gather_rows(x, ranks)

        found = rows(tf.fill([2, 3], float(own)))
        assert found.shape == [2 * len(ranks), 3]
        np.testing.assert_array_equal(found[:, 0], np.repeat(ranks, 2))


@pytest.mark.parametrize("size", [3, LARGE])
def test_objects_lie_in_the_order_of_the_ranks(simulation, size):
    def text(rank):
        return f"{rank} " * (size + rank)

    results = simulation(lambda rank: objects.allgather_objects(text(rank), simulation.ranks))
    expected = [text(rank) for rank in simulation.ranks]
    assert results == dict.fromkeys(simulation.ranks, expected)


def test_a_hundred_ranks_get_all_rows_and_objects_in_their_order(monkeypatch):
    check_order(monkeypatch, 101)


def test_a_thousand_ranks_get_all_rows_and_objects_in_their_order(monkeypatch):
    check_order(monkeypatch, 1001)


def check_order(monkeypatch, size):
    simulation = SimulatedRanks(monkeypatch, range(size))
    ranks = list(range(size))

    def work(rank):
        own = tf.constant([[rank], [-rank]], tf.int64)
        rows = gather_by_rank(own, ranks, group=1, instance=1)
        found = objects.allgather_objects(f"rank {rank}", ranks)
        root = objects.broadcast_object(f"from {rank}", ranks, size - 1)
        assert consistency.agree(ranks, "a step", ["the same"]) >= 0
        return rows[:, 0].numpy().tolist(), found, root

    results = simulation(work)
    expected_rows = [number for rank in ranks for number in (rank, -rank)]
    expected = (expected_rows, [f"rank {rank}" for rank in ranks], f"from {size - 1}")
    assert all(result == expected for result in results.values())


def test_an_object_that_cannot_be_pickled_is_told_of_its_own_rank(simulation):
    bad = simulation.ranks[-1]

    class Unwilling:
        def __reduce__(self):
            raise ValueError("no \udcff")  # no text of UTF-8, such as a path may be

    def work(rank):
        return objects.allgather_objects(print if rank != bad else Unwilling(), simulation.ranks)

    texts = raised(simulation(work), CommunicationError)
    assert all(f"the object of rank {bad}, of type" in text for text in texts)
    assert all("(ValueError: no \\udcff)" in text for text in texts)


def test_objects_are_of_the_rank_that_they_are_said_to_be_of(simulation):
    def work(rank):
        ranks = simulation.ranks
        of_each = [objects.broadcast_object((rank,), ranks, root) for root in ranks]
        if rank == ranks[0]:
            objects.send_object("hello", ranks[1:])
        return [number for (number,) in of_each], rank == ranks[0] or objects.recv_object(ranks[0])

    for numbers, hello in simulation(work).values():
        assert numbers == list(simulation.ranks)
        assert hello in ("hello", True)


def test_a_wrong_order_is_an_error_and_not_a_wrong_object(simulation, monkeypatch):
    monkeypatch.setattr(gathering, "_where_each_is", lambda _: None)
    results = simulation(lambda rank: objects.allgather_objects(rank, simulation.ranks))
    order = str(by_name(simulation.ranks))
    for text in raised(results, CommunicationError):
        assert f"delivered the objects of the ranks {order}" in text
        assert f"Expected: {list(simulation.ranks)}" in text


def test_what_a_rank_does_otherwise_is_told_with_its_own_number(simulation):
    for other in simulation.ranks[1:]:

        def work(rank, other=other):
            line = "partition 1 runs F0" if rank == other else "partition 1 runs F1"
            consistency.agree(simulation.ranks, "a step", ["partition 0 runs F0", line])

        for text in raised(simulation(work), StepError):
            assert f"rank {other}: partition 1 runs F0" in text
            assert f"rank {simulation.ranks[0]}: partition 1 runs F1" in text


def test_slices_lie_in_the_order_of_the_ranks(simulation):
    ranks = simulation.ranks

    def work(rank, is_even):
        count = 2 if is_even else 1 + ranks.index(rank)
        own = tf.IndexedSlices(tf.fill([count, 2], float(rank)), tf.fill([count], rank), [2000, 2])
        found = slices_of_all(own, ranks, name="slices", is_even=is_even)
        return found.indices.numpy().tolist(), found.values[:, 1].numpy().tolist()

    for is_even in (True, False):
        counts = [2 if is_even else 1 + index for index in range(len(ranks))]
        expected = np.repeat(ranks, counts).tolist()
        for indices, values in simulation(lambda r, even=is_even: work(r, even)).values():
            assert indices == expected
            assert values == expected


def test_each_pair_shares_the_memory_that_was_made_for_it(simulation):
    count = len(simulation.ranks)
    pairs = [(a, b) for a in range(count) for b in (a - 1, a + 1) if 0 <= b < count]
    transfers = [transfer([300, 100], source=a, target=b) for a, b in pairs]
    all_rooms = rooms(transfers, ["here"] * count)

    def work(rank):
        me = simulation.ranks.index(rank)

        def everyone(value):
            return objects.allgather_objects(value, simulation.ranks)

        found = share(all_rooms, me, everyone)
        for pair, memory in found.items():
            if pair[0] == me:
                memory.counters[0] = 7 + me
        objects.meet(simulation.ranks)
        return {pair: int(memory.counters[0]) for pair, memory in found.items()}

    for me, found in enumerate(simulation(work).values()):
        assert found == {pair: 7 + pair[0] for pair in pairs if me in pair}


def test_a_batch_of_other_data_is_told_with_the_rank_that_has_it(world_of_12, monkeypatch):
    # As between machines; the pipes of one machine are those of processes.
    monkeypatch.setattr(sync.agreement, "is_same", lambda text, name: False)

    for other in (2, 10, 11):

        def point(rank, other=other):
            sync.meet("stop" if rank == other else "train")

        texts = raised(world_of_12(point), StepError)
        assert all(f"rank {other} is about to stop" in text for text in texts)

        def batch(rank, other=other):
            sync.meet_at_batch("train", np.full([2, 3], float(rank == other)))

        texts = raised(world_of_12(batch), StepError)
        assert all("in rank 0, 1 arrays" in t or f"in rank {other}." in t for t in texts), texts


# ---------------------------------------------------------------------------------- weights


class Spread:
    """A model with a weight in each process, of which this one has its own."""

    def __init__(self, ranks, rank):
        self.weights = [SimpleNamespace(rank=r, here=r == rank, shape=(2,)) for r in ranks]


@pytest.fixture
def weights_of_ranks(monkeypatch):
    """Weights that only say whose they are: TensorFlow's variables are made in one thread."""
    for module in (own_weights, gather):
        monkeypatch.setattr(module, "tf_variable", _value)
    monkeypatch.setattr(gather, "_layout", lambda weight: "(2,) float32")
    monkeypatch.setattr(gather, "_is_here", lambda weight: weight.here)
    monkeypatch.setattr(own_weights._private, "is_elsewhere", lambda weight: not weight.here)
    monkeypatch.setattr(
        gather._private, "lend", lambda weight, value: setattr(weight, "lent", value)
    )
    monkeypatch.setattr(gather._private, "take_back", lambda weight: None)


def _value(weight):
    assert weight.here, f"the weight of rank {weight.rank} is not here"
    return tf.constant([weight.rank, -weight.rank])


def test_get_weights_gives_each_weight_the_value_of_its_rank(simulation, weights_of_ranks):
    def work(rank):
        return [w.tolist() for w in own_weights.values_of(Spread(simulation.ranks, rank))]

    expected = [[rank, -rank] for rank in simulation.ranks]
    assert simulation(work) == dict.fromkeys(simulation.ranks, expected)


@pytest.mark.parametrize("ranks", [tuple(range(12)), (0, 2, 10, 100), (0, 9, 18)], ids=str)
def test_what_is_saved_has_each_weight_of_its_rank(monkeypatch, ranks, weights_of_ranks):
    simulation = SimulatedRanks(monkeypatch, ranks)

    def work(rank):
        model = Spread(simulation.ranks, rank)
        with gather.gathered(model.weights):
            return [w.lent.tolist() for w in model.weights if hasattr(w, "lent")]

    results = simulation(work)
    assert results[0] == [[rank, -rank] for rank in simulation.ranks if rank != 0]


def test_errors_and_files_of_a_rank_are_told_with_its_number(world_of_12, tmp_path):
    for other in (2, 10, 11):

        def fails(rank, other=other):
            gather.together("model.save", lambda: 1 // (rank != other))

        results = world_of_12(fails)
        assert isinstance(results.pop(other), ZeroDivisionError)
        assert all(f"rank {other}: ZeroDivisionError" in t for t in raised(results, SavingError))
        for name in ("same", "other"):
            (tmp_path / name).write_text(name)

        def reads(rank, other=other):
            same_file.check_same_file(tmp_path / ("other" if rank == other else "same"), "load")

        texts = raised(world_of_12(reads), SavingError)
        assert all(f"rank {other} read other contents than rank 0" in text for text in texts)
