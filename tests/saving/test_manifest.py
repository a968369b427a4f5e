from __future__ import annotations

import json
from pathlib import Path

import pytest
import tensorflow as tf

from opensmp.saving.manifest import (
    data_files,
    fault,
    index_path,
    manifest_path,
    write_manifest,
)


@pytest.fixture
def prefix(tmp_path):
    path = tf.train.Checkpoint(value=tf.Variable([1.0, 2.0])).write(str(tmp_path / "ckpt-[1]"))
    write_manifest(path)
    return path


def test_files_of_a_checkpoint_are_found_by_their_prefix(prefix):
    assert index_path(prefix).is_file()
    assert [path.name for path in data_files(prefix)] == ["ckpt-[1].data-00000-of-00001"]


def test_a_manifest_has_the_sizes_of_all_files(prefix):
    record = json.loads(manifest_path(prefix).read_text())
    (data,) = data_files(prefix)
    assert record["bytes"] == {".data-00000-of-00001": data.stat().st_size}
    assert record["index"]["bytes"] == index_path(prefix).stat().st_size


def test_whole_files_have_no_fault_with_or_without_a_manifest(prefix):
    assert fault(prefix) is None
    manifest_path(prefix).unlink()
    assert fault(prefix) is None


def damage(prefix, what):
    (data,) = data_files(prefix)
    if what == "no index":
        index_path(prefix).unlink()
    elif what == "no data":
        data.unlink()
    elif what == "short data":
        data.write_bytes(data.read_bytes()[:-1])
    elif what == "short index":
        index_path(prefix).write_bytes(index_path(prefix).read_bytes()[:-1])
    elif what == "changed index":
        content = bytearray(index_path(prefix).read_bytes())
        content[5] ^= 1
        index_path(prefix).write_bytes(content)
    elif what == "torn manifest":
        manifest_path(prefix).write_text('{"format": 1, "bytes"')
    elif what == "a part is missing":
        manifest_path(prefix).unlink()
        data.rename(prefix + ".data-00000-of-00002")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no index", "there is no file ckpt-[1].index"),
        ("no data", "it has no file with values"),
        ("short data", "ckpt-[1].data-00000-of-00001 has"),
        ("short index", "ckpt-[1].index has"),
        ("changed index", "the checksum of ckpt-[1].index is wrong"),
        ("torn manifest", "ckpt-[1].manifest cannot be read"),
        ("a part is missing", "1 of 2 data files are there"),
    ],
)
def test_each_fault_is_named(prefix, what, message):
    damage(prefix, what)
    assert message in fault(prefix)


@pytest.mark.parametrize("gone", [".index", ".data-00000-of-00001"])
def test_files_that_go_while_they_are_looked_at_are_missing(prefix, gone, monkeypatch):
    write_manifest(prefix)
    original = Path.is_file

    def is_file(path):
        found = original(path)
        if path.name.endswith(gone):
            path.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(Path, "is_file", is_file)
    assert fault(prefix) in (
        f"there is no file {Path(prefix).name}.index",
        f"{Path(prefix).name}.data-00000-of-00001 is missing",
    )
