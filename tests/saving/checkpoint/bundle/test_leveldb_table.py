from __future__ import annotations

import pytest
import tensorflow as tf

from opensmp.saving.checkpoint.bundle.leveldb_table import table, table_fault, varint


@pytest.fixture
def index(tmp_path):
    tf.train.Checkpoint(v=tf.Variable([1.0, 2.0])).write(str(tmp_path / "c"))
    return (tmp_path / "c.index").read_bytes()


def test_tables_of_tensorflow_and_our_own_have_no_fault(index):
    assert table_fault(index) is None
    assert table_fault(table([(b"", b"x"), (b"key", b"value" * 100)])) is None


@pytest.mark.parametrize("size", [0, 1, 47])
def test_a_torn_table_has_a_fault(index, size):
    assert "does not end as an index does" in table_fault(index[:size])
    assert "does not end as an index does" in table_fault(index[:-1])


def test_a_block_beyond_the_end_is_a_fault(index):
    for position in range(0, 20, 2):
        for value in (2**56, 2**62):
            footer = bytearray(index[-48:])
            text = varint(value)
            footer[position : position + len(text)] = text
            found = table_fault(index[:-48] + bytes(footer[:48]))
            assert found is None or "has a block of" in found
    endless = index[:-48] + b"\xff" * 40 + index[-8:]
    assert "has a block of" in table_fault(endless)


def test_varints_are_those_of_protocol_buffers():
    assert [varint(x) for x in (0, 127, 128, 300)] == [b"\0", b"\x7f", b"\x80\1", b"\xac\2"]
