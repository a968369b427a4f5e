from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from opensmp.api import sharding
from opensmp.config import Config
from opensmp.distributed import world
from opensmp.errors import ConfigError, NotInitializedError


def replica(number: int, count: int = 4) -> None:
    """Makes this process the first rank of one of several replicas of two ranks."""
    ranks = tuple(range(0, 2 * count, 2))
    world.set_current(
        world.World(
            config=Config(partitions=2),
            devices=("/device:CPU:0",) * 2,
            rank=ranks[number],
            size=2 * count,
            mp_group=(ranks[number], ranks[number] + 1),
            dp_group=ranks,
        )
    )


def of_all(data, **kwargs):
    parts = []
    for number in range(4):
        replica(number)
        part = sharding.shard(data, **kwargs)
        parts.append(list(part.as_numpy_iterator()) if isinstance(part, tf.data.Dataset) else part)
    return parts


def test_elements_are_dealt_out_in_turn():
    parts = of_all(tf.data.Dataset.range(8))
    assert parts == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_parts_of_batches_put_together_are_the_batches():
    images, labels = np.arange(32.0).reshape(16, 2), np.arange(16)
    data = tf.data.Dataset.from_tensor_slices((images, labels)).batch(8, drop_remainder=True)
    parts = of_all(data, batched=True)
    for number, (batch, numbers) in enumerate(data.as_numpy_iterator()):
        np.testing.assert_array_equal(np.concatenate([p[number][0] for p in parts]), batch)
        np.testing.assert_array_equal(np.concatenate([p[number][1] for p in parts]), numbers)
    replica(0)
    assert sharding.shard(data, batched=True).element_spec[0].shape == [2, 2]


@pytest.mark.parametrize("element", [{"x": np.arange(8)}, (np.arange(8),), np.arange(8)])
def test_elements_keep_their_structure(element):
    data = tf.data.Dataset.from_tensor_slices(element).batch(4)
    replica(1)
    part = sharding.shard(data, batched=True)
    tf.nest.assert_same_structure(part.element_spec, data.element_spec)
    values = tf.nest.flatten(list(part.as_numpy_iterator()))
    assert np.concatenate(values).tolist() == [1, 5]


def test_arrays_are_cut_along_their_first_axis():
    parts = of_all({"x": np.arange(8), "y": tf.range(16)})
    assert [p["x"].tolist() for p in parts] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert parts[3]["y"].numpy().tolist() == [12, 13, 14, 15]


def test_one_replica_gets_everything():
    world.set_current(world.World(config=Config(partitions=1), devices=("/device:CPU:0",)))
    data, array = tf.data.Dataset.range(3), np.arange(3)
    assert sharding.shard(data) is data
    assert sharding.shard(data, batched=True) is data
    np.testing.assert_array_equal(sharding.shard(array), array)


def test_dataset_that_cannot_be_divided_is_an_error_with_a_remedy():
    replica(0)
    with pytest.raises(ConfigError, match=r"10 elements .* 4 replicas.*dataset.take\(8\)"):
        sharding.shard(tf.data.Dataset.range(10))


def test_array_that_cannot_be_divided_is_an_error():
    replica(0)
    with pytest.raises(ConfigError, match=r"shape \(10, 2\).*4 replicas.*Leave 2 examples out"):
        sharding.shard(np.zeros([10, 2]))
    with pytest.raises(ConfigError, match=r"shape \(\)"):
        sharding.shard(np.float32(1))


def test_batch_that_cannot_be_divided_is_an_error():
    replica(0)
    batches = tf.data.Dataset.range(12).batch(6, drop_remainder=True)
    with pytest.raises(ConfigError, match=r"shape \(6,\)"):
        sharding.shard(batches, batched=True)
    last_is_smaller = sharding.shard(tf.data.Dataset.range(10).batch(4), batched=True)
    with pytest.raises(tf.errors.InvalidArgumentError, match="multiples of 4"):
        list(last_is_smaller)


def test_before_init_it_is_an_error():
    with pytest.raises(NotInitializedError, match=r"smp\.shard"):
        sharding.shard(np.zeros(4))


@pytest.mark.parametrize("element", [lambda i: i, lambda i: {"x": (i, [i])}], ids=["plain", "nest"])
def test_datasets_of_unknown_length_give_all_equally_much(element):
    dataset = tf.data.Dataset.range(11).filter(lambda i: i != 3).map(element)
    rounds = zip(*of_all(dataset), strict=True)
    firsts = [[int(tf.nest.flatten(each)[0]) for each in elements] for elements in rounds]
    assert firsts == [[0, 1, 2, 4], [5, 6, 7, 8]]  # 9 and 10 are not enough for four
