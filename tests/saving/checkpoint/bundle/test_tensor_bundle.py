from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import tensorflow as tf

from opensmp.saving.checkpoint.bundle import tensor_bundle
from opensmp.saving.checkpoint.bundle.tensor_bundle import PAGE_BYTES, Entry, write_bundle
from opensmp.saving.checkpoint.shards import Named, merge_parts, write_part

FIRST = np.random.default_rng(0).normal(size=(300, 1001)).astype("float32")
SECOND = np.arange(7, dtype="int64")


@pytest.fixture
def content():
    memory = np.zeros(301 * PAGE_BYTES + 64, np.uint8)
    begin = -memory.ctypes.data % PAGE_BYTES
    memory = memory[begin : begin + 300 * PAGE_BYTES]
    entries = []
    offset = 0
    for name, value in (("b", FIRST), ("a/longer", SECOND)):
        raw = value.reshape(-1).view(np.uint8)
        memory[offset : offset + raw.size] = raw
        dtype = tf.as_dtype(value.dtype).as_datatype_enum
        entries.append(Entry(name, dtype, value.shape, offset, raw.size))
        offset += -(-raw.size // 64) * 64
    return memory, entries


def check(prefix):
    reader = tf.train.load_checkpoint(prefix)
    np.testing.assert_array_equal(reader.get_tensor("b"), FIRST)
    np.testing.assert_array_equal(reader.get_tensor("a/longer"), SECOND)
    assert dict(tf.train.list_variables(prefix))["b"] == [300, 1001]


def test_plain_tensorflow_reads_it(tmp_path, content):
    prefix = str(tmp_path / "c")
    write_bundle(prefix, *content)
    check(prefix)
    last = content[1][-1]
    assert os.path.getsize(f"{prefix}.data-00000-of-00001") == last.offset + last.size


def test_it_merges_with_what_tensorflow_wrote(tmp_path, content):
    write_bundle(str(tmp_path / "large"), *content)
    write_part(str(tmp_path / "small"), [Named("ab", "", tf.constant(["text"]))])
    prefix = str(tmp_path / "whole")
    merge_parts([str(tmp_path / "small"), str(tmp_path / "large")], prefix)
    check(prefix)
    assert tf.train.load_checkpoint(prefix).get_tensor("ab").tolist() == [b"text"]


def test_a_changed_bit_is_found(tmp_path, content):
    prefix = str(tmp_path / "c")
    write_bundle(prefix, *content)
    with open(f"{prefix}.data-00000-of-00001", "r+b") as file:
        file.seek(1_000_000)
        byte = file.read(1)[0]
        file.seek(1_000_000)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(tf.errors.DataLossError, match="Checksum does not match"):
        tf.raw_ops.RestoreV2(
            prefix=prefix, tensor_names=["b"], shape_and_slices=[""], dtypes=[tf.float32]
        )


def test_file_systems_that_cannot_write_past_their_cache_write_through_it(
    tmp_path, content, monkeypatch
):
    original = os.pwrite
    refused = []

    def pwrite(file, data, offset):
        if not refused:
            refused.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")
        return original(file, data[:100_001], offset)  # nor need it be all at once

    monkeypatch.setattr(os, "pwrite", pwrite)
    write_bundle(str(tmp_path / "c"), *content)
    assert refused
    check(str(tmp_path / "c"))


def test_other_errors_are_told(tmp_path, content, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space"):
        write_bundle(str(tmp_path / "c"), *content)


def test_headers_and_entries_are_those_of_tensorflow(tmp_path):
    tf.raw_ops.SaveV2(
        prefix=str(tmp_path / "t"), tensor_names=["b"], shape_and_slices=[""], tensors=[FIRST]
    )
    raw = FIRST.reshape(-1).view(np.uint8)
    entry = Entry("b", tf.float32.as_datatype_enum, FIRST.shape, 0, raw.size)
    theirs = (tmp_path / "t.index").read_bytes()
    for _, record in tensor_bundle._records([entry], [tensor_bundle.crc32c(raw)]):
        assert record in theirs
