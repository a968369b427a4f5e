"""Twelve real ranks against plain Keras: from eleven on they are not in the order of their names.

Groups that would need more processes are simulated, see `simulated`.
"""

from __future__ import annotations

import pathlib
import pickle

import keras
import numpy as np
import pytest
from parity import many_ranks
from processes import check_ranks
from turns import turn

SCRIPT = str(pathlib.Path(many_ranks.__file__))


@pytest.fixture
def plain():
    """Losses and weights of plain Keras on the whole batches."""
    model = many_ranks.build()
    model.compile(many_ranks.optimizer(), "mse")
    losses, weights = [], []
    for _ in range(2):
        losses.append(many_ranks.fit(model))
        weights.append(model.get_weights())
    yield losses, weights
    keras.config.set_floatx("float32")


def close(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-13)


@turn(3, 14)
@pytest.mark.timeout(1200)
def test_twelve_ranks_train_save_restore_and_give_the_numbers_of_plain_keras(tmp_path, plain):
    check_ranks(SCRIPT, 12, args=[tmp_path], join_seconds=300, seconds=900)
    losses, weights = plain
    for rank in range(12):
        records = pickle.loads((tmp_path / f"{rank}.pickle").read_bytes())
        for partitions, replicas in many_ranks.LAYOUTS.items():
            record = records[partitions]
            of_replica, alike = record["groups"]
            assert (len(of_replica), len(alike)) == (partitions, replicas)
            found = record["gathered"]
            assert found["WORLD"] == list(range(12))
            assert found["MP_GROUP"] == of_replica
            assert found["DP_GROUP"] == alike
            assert found["rows"] == [member for member in alike for _ in range(2)]
            close([record["loss"], record["next loss"]], losses)
            close(record["trained"], weights[0])
            close(record["further"], weights[1])
            for one, other in zip(record["restored"], record["trained"], strict=True):
                np.testing.assert_array_equal(one, other)
            assert record["loss again"] == record["next loss"]
    for partitions in many_ranks.LAYOUTS:
        loaded = keras.models.load_model(tmp_path / f"{partitions}.keras")
        close(loaded.get_weights(), weights[0])
