from __future__ import annotations

import json
from pathlib import Path

import pytest
import tensorflow as tf

from opensmp.saving.checkpoint.directory import manifest
from opensmp.saving.checkpoint.directory.manifest import (
    History,
    fault,
    history_of,
    mark_preserved,
    write_manifest,
)
from opensmp.saving.checkpoint.directory.names import data_files, index_path, manifest_path


@pytest.fixture
def prefix(tmp_path):
    path = tf.train.Checkpoint(value=tf.Variable([1.0, 2.0])).write(str(tmp_path / "ckpt-[1]"))
    write_manifest(path)
    return path


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


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7",
        "null",
        '"text"',
        "[]",
        "[" * 100_000,
        '{"a":' * 50_000,
        '{"bytes": 1, "index": {"bytes": 1, "crc32": 1}}',
        '{"bytes": {}, "index": {"bytes": 1, "crc32": 1}}',
        '{"bytes": {"/../../etc/passwd": 1}, "index": {"bytes": 1, "crc32": 1}}',
        '{"bytes": {".data-00000-of-00001": 1e400}, "index": {"bytes": 1, "crc32": 1}}',
        '{"bytes": {".data-00000-of-00001": NaN}, "index": {"bytes": 1, "crc32": 1}}',
        '{"bytes": {".data-00000-of-00001": ' + "9" * 10_000 + "}}",
        '{"bytes": {".data-00000-of-00001": 1}, "index": 5}',
        '{"bytes": {".data-00000-of-00001": 1}, "index": {"bytes": 1, "crc32": 1}, "history": 1}',
        "\ud800",
    ],
)
def test_a_manifest_of_any_content_is_at_most_unreadable(prefix, text):
    manifest_path(prefix).write_bytes(text.encode(errors="surrogatepass"))
    assert "ckpt-[1].manifest cannot be read" in fault(prefix)
    assert history_of(prefix) is None


def test_a_manifest_that_is_no_file_or_too_long_is_unreadable(prefix, monkeypatch):
    text = manifest_path(prefix).read_text()
    monkeypatch.setattr(manifest, "_LARGEST_BYTES", 1000)
    manifest_path(prefix).write_text(text + " " * 1000)
    assert "more than 1000 bytes" in fault(prefix)
    manifest_path(prefix).unlink()
    manifest_path(prefix).mkdir()
    assert "IsADirectoryError" in fault(prefix)
    assert history_of(prefix) is None


def test_an_index_without_manifest_is_looked_at_before_tensorflow_does(prefix):
    manifest_path(prefix).unlink()
    content = bytearray(index_path(prefix).read_bytes())
    content[-48:-40] = b"\xff" * 7 + b"\x7f"  # a block of 2 ** 56 bytes
    index_path(prefix).write_bytes(content)
    assert "has a block of" in fault(prefix) or "does not end" in fault(prefix)
    index_path(prefix).write_bytes(b"")
    assert "does not end as an index does" in fault(prefix)


def test_a_manifest_tells_how_the_checkpoint_came_about(prefix, tmp_path):
    assert history_of(prefix).after == ""  # as those of earlier versions do
    history = History(12.5, "ckpt-3", 1.25)
    write_manifest(prefix, history)
    assert history_of(prefix) == history
    assert fault(prefix) is None
    (tmp_path / "scratch").mkdir()
    mark_preserved(prefix, str(tmp_path / "scratch"))
    assert history_of(prefix) == history._replace(preserved=True)
    assert fault(prefix) is None
    assert history_of(str(tmp_path / "nothing")) is None
