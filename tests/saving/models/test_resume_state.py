from __future__ import annotations

import h5py
import keras
import numpy as np
import pytest

import opensmp as smp
from opensmp.saving.models import resume_state


def small():
    return keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])


@pytest.fixture
def model():
    smp.shutdown()
    smp.init({"partitions": 1})
    return smp.DistributedModel.from_keras(small())


def test_only_the_named_file_gets_something_and_plain_keras_reads_it(model, tmp_path):
    there, other = str(tmp_path / "there.weights.h5"), str(tmp_path / "other.weights.h5")
    with resume_state.written(model, [there], lambda: b"how far"):
        model.save_weights(there)
        model.save_weights(other)
    model.save_weights(str(tmp_path / "later.weights.h5"))
    assert resume_state.read(there) == b"how far"
    assert resume_state.read(other) is None
    assert resume_state.read(str(tmp_path / "later.weights.h5")) is None
    assert resume_state.read(str(tmp_path / "nothing")) is None
    plain = small()
    plain.load_weights(there)
    for one, another in zip(plain.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, another)


def test_what_plain_keras_or_another_has_written_is_left_alone(tmp_path):
    plain = str(tmp_path / "plain.weights.h5")
    small().save_weights(plain)
    assert resume_state.read(plain) is None
    (tmp_path / "secret").write_bytes(b"another's")
    with h5py.File(plain, "a") as file:
        file.create_dataset("smp_fit", (9,), "u1", external=[(str(tmp_path / "secret"), 0, 9)])
    assert resume_state.read(plain) is None
