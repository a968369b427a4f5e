"""Unequal files of several processes: see api/test_io.py."""

from __future__ import annotations

import os

from saving.sample_models import functional

import opensmp as smp
from opensmp.saving.models.same_file import check_same_file, digest


def test_contents_and_names_make_the_checksum(tmp_path):
    model = functional()
    for name in ("a.json", "b.ckpt", "c"):
        smp.save_model(model, tmp_path / name)
    found = {name: digest(tmp_path / name) for name in ("a.json", "b.ckpt", "c")}
    assert found == {name: digest(tmp_path / name) for name in found}
    parts = {
        "a.json": "a.weights.h5",
        "b.ckpt": "b.ckpt.data-00000-of-00001",
        "c": "c/variables/variables.data-00000-of-00001",
    }
    for name, part in parts.items():
        content = (tmp_path / part).read_bytes()
        (tmp_path / part).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert digest(tmp_path / name) != found[name]


def test_one_process_compares_nothing(tmp_path):
    check_same_file(tmp_path / "not there", "load")


def test_names_of_any_bytes_have_a_checksum(tmp_path):
    file = tmp_path / os.fsdecode(b"a\xff.keras")
    file.write_bytes(b"1")
    assert digest(file) != digest(file.rename(tmp_path / "b.keras"))
