from __future__ import annotations

import mmap

import numpy as np
import pytest
import tensorflow as tf

from opensmp.saving.checkpoint.background import staging as module
from opensmp.saving.checkpoint.background.staging import Staging
from opensmp.saving.checkpoint.shards import Named

LARGE = [200, 1001]


@pytest.fixture(autouse=True)
def less_is_large(monkeypatch):
    monkeypatch.setattr(module, "_WORTH_BYTES", 64 << 10)


def values(*dtypes):
    numbers = tf.reshape(tf.range(200 * 1001) % 100, LARGE)
    return [Named(dtype.name, "", tf.cast(numbers, dtype)) for dtype in dtypes]


def test_copies_have_the_bits_of_the_values():
    dtypes = (tf.float32, tf.bfloat16, tf.float16, tf.float64, tf.int8, tf.int64, tf.uint32)
    given = values(*dtypes)
    expected = [bytes(np.asarray(value.tensor).tobytes()) for value in given]
    staging = Staging()
    entries = staging.take(given)
    assert given == []
    assert [entry.name for entry in entries] == [dtype.name for dtype in dtypes]
    assert [entry.dtype for entry in entries] == [dtype.as_datatype_enum for dtype in dtypes]
    for entry, bits in zip(entries, expected, strict=True):
        assert entry.shape == tuple(LARGE)
        assert staging.memory[entry.offset : entry.offset + entry.size].tobytes() == bits


def test_small_values_slices_and_what_are_no_numbers_stay():
    small = Named("small", "", tf.ones([100]))
    text = Named("text", "", tf.constant(["x"] * 20_000))
    flags = Named("flags", "", tf.ones([100_000], tf.bool))
    piece = Named("piece", "10 0,5", tf.ones([100_000]))
    given = [small, *values(tf.float32), text, flags, piece]
    assert [entry.name for entry in Staging().take(given)] == ["float32"]
    assert given == [small, text, flags, piece]
    nothing = Staging()
    assert nothing.take([small]) == []
    assert nothing.memory.size == 0


def test_the_memory_is_used_again_and_grows():
    staging = Staging()
    staging.take(values(tf.float32, tf.float64))
    memory = staging.memory
    assert memory.ctypes.data % 4096 == memory.size % 4096 == 0
    staging.take(values(tf.float32))
    assert staging.memory is memory
    staging.take(values(tf.float32, tf.float64, tf.int64))
    assert staging.memory.size > memory.size


def address(variable):
    return np.asarray(memoryview(variable.read_value())).ctypes.data


def test_a_variable_that_has_been_copied_changes_in_its_place():
    variable = tf.Variable(tf.ones(LARGE))
    before = address(variable)
    given = [Named("v", "", variable.read_value())]
    staging = Staging()
    (entry,) = staging.take(given)
    variable.assign_add(tf.ones(LARGE))
    assert address(variable) == before
    assert set(staging.memory[: entry.size].view(np.float32)) == {1.0}
    held = variable.read_value()  # whereas one that somebody has a hold on is copied
    variable.assign_add(tf.ones(LARGE))
    assert address(variable) != before
    assert set(held.numpy().flat) == {2.0}


def test_no_memory_is_an_error_that_says_what_to_do(monkeypatch):
    def none(*args, **kwargs):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", none)
    with pytest.raises(MemoryError, match=r"1 MiB of host memory .* Without background=True"):
        Staging().take(values(tf.float32))
