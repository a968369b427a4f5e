from __future__ import annotations

import os
import threading

import numpy as np
import pytest
import tensorflow as tf

from opensmp.saving.checkpoint import shards
from opensmp.saving.checkpoint.shards import (
    Named,
    at_low_priority,
    divided,
    merge_parts,
    read_tensors,
    write_part,
)


def test_groups_are_of_about_equal_size_and_in_order():
    mebi = 1 << 20
    assert divided("abc", [100 * mebi, 50 * mebi, 50 * mebi], threads=2) == [["a"], ["b", "c"]]
    assert divided("abc", [1, 1, 1], threads=8) == [["a", "b", "c"]]  # not worth a thread
    assert divided("", [], threads=2) == []
    assert divided("a", [100 * mebi], threads=2) == [["a"]]


def test_parts_that_are_merged_are_one_checkpoint_of_tensorflow(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_WORTH_A_THREAD_BYTES", 8)  # reads with two threads
    first = [Named(name, "", tf.fill([4], float(ord(name)))) for name in "abc"]
    second = [Named("n", "", tf.constant(7, tf.int64)), Named("s", "", tf.constant("text"))]
    prefixes = write_part(str(tmp_path / "part-0"), first)
    prefixes += write_part(str(tmp_path / "part-1"), second)
    assert write_part(str(tmp_path / "part-2"), []) == []
    whole = str(tmp_path / "whole")
    merge_parts(prefixes, whole)
    assert sorted(name for name, _ in tf.train.list_variables(whole)) == ["a", "b", "c", "n", "s"]
    names, dtypes = ["s", "b", "n"], [tf.string, tf.float32, tf.int64]
    found = read_tensors(whole, names, dtypes, [4, 16, 8], threads=2)
    assert found[0].numpy() == b"text"
    np.testing.assert_array_equal(found[1], np.full(4, ord("b"), np.float32))
    assert int(found[2]) == 7


def test_low_priority_is_that_of_one_thread_and_results_and_errors_come_through():
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    found = at_low_priority(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
    assert found == 19
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before
    with pytest.raises(ZeroDivisionError):
        at_low_priority(lambda: 1 / 0)


def test_a_program_that_is_ending_starts_no_threads(monkeypatch):
    def refused(self):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refused)
    assert at_low_priority(lambda: 7) == 7
