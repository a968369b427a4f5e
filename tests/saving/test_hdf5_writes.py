from __future__ import annotations

import io
import resource
import threading

import h5py
import numpy as np
import pytest

from opensmp.saving.hdf5_writes import failing_late


def write(path, count, mode="w"):
    with h5py.File(path, mode) as file:
        for number in range(count):
            file[f"{mode}{number}"] = np.full(1000, number)


def test_files_have_what_was_written(tmp_path):
    with failing_late():
        write(tmp_path / "a.h5", 20)
        write(tmp_path / "a.h5", 5, "a")
        write(tmp_path / "b.h5", 2, "x")
    for name, count in {"a.h5": 25, "b.h5": 2}.items():
        with h5py.File(tmp_path / name) as file:
            assert len(file) == count
            for key in file:
                np.testing.assert_array_equal(file[key], np.full(1000, int(key[1:])))


@pytest.mark.parametrize("mode", ["w", "a"])
def test_an_error_of_writing_comes_at_the_end_and_the_library_works_on(tmp_path, mode):
    write(tmp_path / "a.h5", 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fail():
        with failing_late():
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
            try:
                write(tmp_path / "a.h5", 30, mode)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    for _ in range(10):
        with pytest.raises(OSError, match="File too large"):
            fail()
        write(tmp_path / "other.h5", 30)  # here the process ended
        with h5py.File(tmp_path / "other.h5") as file:
            assert len(file) == 30


def test_files_in_memory_files_to_read_and_other_threads_are_left_alone(tmp_path):
    original = h5py.File
    write(tmp_path / "a.h5", 3)
    with failing_late():
        with failing_late():
            write(io.BytesIO(), 2)
        assert isinstance(h5py.File(tmp_path / "a.h5"), original)
        thread = threading.Thread(target=write, args=(tmp_path / "b.h5", 2))
        thread.start()
        thread.join()
    assert h5py.File is original
    with h5py.File(tmp_path / "b.h5") as file:
        assert len(file) == 2
