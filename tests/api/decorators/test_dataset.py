from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from processes import check_ranks

import opensmp as smp
from opensmp.errors import ConfigError

NUMBERS = np.arange(10)


def values_of(dataset, count=None):
    return [batch.numpy().tolist() for batch in dataset.take(-1 if count is None else count)]


def data(*args, **kwargs):
    return smp.distributed_dataset(*args, **kwargs)(lambda: NUMBERS)()


def test_arrays_become_batches_and_their_number_is_known():
    dataset, steps = data(4)
    assert values_of(dataset) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert steps == 2
    dataset, steps = data(4, drop_remainder=False)
    assert values_of(dataset)[-1] == [8, 9]
    assert steps == 3


def test_a_dataset_that_repeats_leaves_nothing_out():
    dataset, steps = data(4, repeat=True)
    assert steps == 3
    assert values_of(dataset, 3)[-1] == [8, 9, 0, 1]


def test_a_dataset_that_repeats_fills_batches_larger_than_itself():
    dataset, steps = data(11, repeat=True)
    assert steps == 1
    assert values_of(dataset, 2)[1] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


def test_shuffling_is_the_same_everywhere_and_another_in_each_epoch():
    one, other = (data(5, shuffle=True, seed=3).dataset for _ in range(2))
    first, second = values_of(one), values_of(one)
    assert first == values_of(other)
    assert first != second
    assert sorted(number for batch in first for number in batch) == list(range(10))


def test_nests_and_datasets_of_examples():
    @smp.distributed_dataset(batch_size=2)
    def pairs(count: int):
        """Pairs."""
        return {"x": np.zeros((count, 3))}, np.zeros(count)

    assert (pairs.__name__, pairs.__doc__) == ("pairs", "Pairs.")
    x, y = next(iter(pairs(6).dataset))
    assert (x["x"].shape, y.shape, pairs(6).steps_per_epoch) == ((2, 3), (2,), 3)
    found = smp.distributed_dataset(4)(lambda: tf.data.Dataset.range(9))()
    assert found.steps_per_epoch == 2
    unknown = tf.data.Dataset.range(9).filter(lambda x: x > 1)
    assert smp.distributed_dataset(4)(lambda: unknown)().steps_per_epoch is None


def test_what_is_not_possible_is_refused():
    with pytest.raises(ConfigError, match=r"batch_size must be 1 or more; .*; shuffle must be"):
        smp.distributed_dataset(0, shuffle=-1)
    with pytest.raises(ConfigError, match="different numbers of examples"):
        smp.distributed_dataset(1)(lambda: (np.zeros(3), np.zeros(4)))()
    with pytest.raises(ConfigError, match=r"received generator. For a generator use"):
        smp.distributed_dataset(1)(lambda: (x for x in range(3)))()
    with pytest.raises(ConfigError, match="10 examples do not fill one batch of 11"):
        data(11)
    unknown = tf.data.Dataset.range(9).filter(lambda x: x > 1)
    with pytest.raises(ConfigError, match=r"Give the size of the buffer"):
        smp.distributed_dataset(2, shuffle=True)(lambda: unknown)()


SCRIPT = """
import numpy as np
import opensmp as smp
from opensmp.errors import ConfigError

smp.init({"partitions": 1, "microbatches": 1})

@smp.distributed_dataset(batch_size=4)
def numbers():
    return np.arange(10)

dataset, steps = numbers()
print(steps, [batch.numpy().tolist() for batch in dataset])
whole = smp.distributed_dataset(batch_size=4, shard=False)(lambda: np.arange(10))().dataset
print([batch.numpy().tolist() for batch in whole])
try:
    smp.distributed_dataset(batch_size=5)(lambda: np.arange(10))()
except ConfigError as error:
    print(error)
"""


def test_each_replica_gets_its_part_of_each_batch():
    results = check_ranks(SCRIPT, 2)
    assert results[0].lines[0] == "2 [[0, 1], [4, 5]]"
    assert results[1].lines[0] == "2 [[2, 3], [6, 7]]"
    for result in results:
        assert result.lines[1] == "[[0, 1, 2, 3], [4, 5, 6, 7]]"
        assert "batch_size=5 cannot be divided among 2 replicas" in result.lines[2]
