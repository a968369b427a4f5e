"""The file of offloaded tensors: what is read is what was written, and its space is used again."""

from __future__ import annotations

import os
import threading
from typing import Any

import numpy as np
import pytest

from opensmp.errors import StepError
from opensmp.execution.memory.spill_file import MOST_COPIES, Spill, SpillFile

PAGE = 4096


def spill_of(file: SpillFile, value: Any, reads: int = 1) -> Spill:
    spill = Spill(file, value.shape, value.dtype)
    spill.request(reads)
    return spill


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint64", "float16", "float32", "complex128"])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5, 7), (1025,)])
def test_a_copy_has_the_bits_shape_and_dtype_of_the_tensor(tmp_path, dtype, shape):
    value = np.random.default_rng(0).normal(size=shape).astype(dtype)
    file = SpillFile(str(tmp_path))
    spill = spill_of(file, value)
    found = spill.read(spill.write(value))
    assert found.dtype == value.dtype
    assert found.ctypes.data % 64 == 0, "TensorFlow would copy it"
    np.testing.assert_array_equal(found, value)
    assert file.used_bytes == 0


def test_the_file_has_no_name_and_is_closed(tmp_path):
    file = SpillFile(str(tmp_path))
    descriptor = file._descriptor
    assert os.listdir(tmp_path) == []
    assert os.fstat(descriptor).st_nlink == 0
    del file
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_free_space_is_joined_and_used_again(tmp_path):
    file = SpillFile(str(tmp_path))
    blocks = [file.write(np.full(PAGE, i, np.uint8)) for i in range(12)]
    assert file.num_bytes == 12 * PAGE
    for i in (3, 5, 4, 11):
        file.free(blocks[i])
    large = file.write(np.full(3 * PAGE - 7, 100, np.uint8))
    assert large.offset == 3 * PAGE
    last = file.write(np.full(2 * PAGE, 101, np.uint8))  # grows at the end
    assert last.offset == 11 * PAGE
    assert file.num_bytes == 13 * PAGE == file.used_bytes
    for i in (0, 1, 2, 6, 7, 8, 9, 10):
        assert set(file.read(blocks[i], PAGE)) == {i}
    assert set(file.read(large, 3 * PAGE - 7)) == {100}


def test_a_copy_is_free_after_as_many_reads_as_runs_make(tmp_path):
    file = SpillFile(str(tmp_path))
    value = np.arange(10)
    spill = Spill(file, value.shape, value.dtype)
    spill.own_reads = 1
    spill.request(2)
    number = spill.write(value)
    for reads in range(3):
        assert file.used_bytes, reads
        np.testing.assert_array_equal(spill.read(number), value)
    assert file.used_bytes == 0
    with pytest.raises(StepError, match='set "offload" to "none"'):
        spill.read(number)


def test_what_nothing_reads_is_not_written(tmp_path):
    file = SpillFile(str(tmp_path))
    spill = spill_of(file, np.arange(10), reads=0)
    spill.write(np.arange(10))
    assert file.num_bytes == 0


def test_the_oldest_copies_go_if_it_is_not_known_who_reads_them(tmp_path):
    file = SpillFile(str(tmp_path))
    value = np.arange(10)
    spill = Spill(file, value.shape, value.dtype)
    spill.request(1)
    spill.request(1)  # another graph, which may run or not
    numbers = [spill.write(value + i) for i in range(MOST_COPIES + 3)]
    assert file.used_bytes == MOST_COPIES * PAGE
    for i, number in enumerate(numbers):
        if i < 3:
            with pytest.raises(StepError, match=f"more than {MOST_COPIES} calls later"):
                spill.read(number)
        else:
            np.testing.assert_array_equal(spill.read(number), value + i)
    del spill
    assert file.used_bytes == 0


def test_runs_at_the_same_time_do_not_mix(tmp_path):
    file = SpillFile(str(tmp_path))
    faults: list[Any] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(60):
            value = random.integers(0, 255, int(random.integers(1, 5 * PAGE)), np.uint8)
            spill = spill_of(file, value)
            if not np.array_equal(spill.read(spill.write(value)), value):
                faults.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert file.used_bytes == 0


def test_a_disk_that_is_full_names_the_folder_and_loses_nothing(tmp_path, monkeypatch):
    file = SpillFile(str(tmp_path))
    before = file.write(np.full(PAGE, 7, np.uint8))
    write = os.pwrite

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        if len(data) <= PAGE:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[:PAGE], offset)  # a part, as the system may do

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(StepError) as caught:
        file.write(np.zeros(3 * PAGE, np.uint8))
    message = str(caught.value)
    assert f"{3 * PAGE} bytes could not be written" in message
    assert str(tmp_path) in message
    assert "No space left on device. Make room there" in message
    assert file.used_bytes == PAGE
    assert set(file.read(before, PAGE)) == {7}


def test_a_file_that_something_else_has_cut_is_not_read_as_zeros(tmp_path):
    file = SpillFile(str(tmp_path))
    block = file.write(np.full(PAGE, 7, np.uint8))
    os.ftruncate(file._descriptor, 100)
    with pytest.raises(StepError, match="ended 3996 bytes early"):
        file.read(block, PAGE)
