from __future__ import annotations

import pytest

from opensmp.saving.checkpoint.directory.names import (
    data_files,
    index_path,
    is_pattern,
    manifest_path,
    parsed,
    without_ending,
)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("ckpt-0.index", (0, ".index")),
        ("ckpt-12.manifest", (12, ".manifest")),
        ("ckpt-100.data-00003-of-00010", (100, ".data-00003-of-00010")),
        ("ckpt-7", (7, "")),
    ],
)
def test_names_of_a_checkpoint_and_a_number_are_its_files(file, expected):
    assert parsed(file, "ckpt") == expected


@pytest.mark.parametrize(
    "file",
    [
        "ckpt-007.index",
        "ckpt-+7.index",
        "ckpt--7.index",
        "ckpt-\u0667.index",  # an Arabic digit
        "ckpt-7.index\n",
        "ckpt-7.index.bak",
        "ckpt-7.data-00000-of-00001.bak",
        "ckpt-7.data-0000x-of-00001",
        "ckpt-7.data-00000-of-000010",
        "ckpt-best.index",
        "ckpt-best-3.index",
        "ckpt-3-1.index",
        "ckpt.index",
        "xckpt-3.index",
        ".ckpt-3.index",
        "CKPT-3.index",
        "checkpoint",
    ],
)
def test_names_that_only_begin_alike_are_of_others(file):
    assert parsed(file, "ckpt") is None


def test_the_name_is_no_pattern():
    assert parsed("a.c-1.index", "a.c") == (1, ".index")
    assert parsed("abc-1.index", "a.c") is None


def test_files_of_a_checkpoint_are_found_by_their_prefix(tmp_path):
    (tmp_path / "[1]").mkdir()
    prefix = str(tmp_path / "[1]" / "c*-1")
    assert (index_path(prefix).name, manifest_path(prefix).name) == ("c*-1.index", "c*-1.manifest")
    for ending in ("data-00001-of-00002", "data-00000-of-00002", "data-00000-of-00002.bak"):
        (tmp_path / "[1]" / f"c*-1.{ending}").write_text("x")
    (tmp_path / "[1]" / "cx-1.data-00000-of-00001").write_text("x")
    (tmp_path / "[1]" / "c*-1.data-00000-of-00001").mkdir()
    assert [path.name for path in data_files(prefix)] == [
        "c*-1.data-00000-of-00002",
        "c*-1.data-00001-of-00002",
    ]


def test_paths_that_tensorflow_takes_for_patterns_are_known():
    assert all(is_pattern(f"/a{character}b") for character in "[]*?\\")
    assert not is_pattern("/a b/\u00fc~{}.-")


@pytest.mark.parametrize("ending", ["", ".index", ".manifest", ".data-00000-of-00001"])
def test_the_path_of_any_file_is_that_of_its_checkpoint(ending):
    assert without_ending(f"/a.index/ckpt-1{ending}") == "/a.index/ckpt-1"
