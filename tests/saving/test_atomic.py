from __future__ import annotations

import os

import pytest

from opensmp.errors import SavingError
from opensmp.saving.atomic import is_remote, new_directory, new_file, new_prefix


def test_a_file_appears_when_it_is_complete(tmp_path):
    target = tmp_path / "deep" / "model.weights.h5"
    with new_file(target) as name:
        assert name.endswith("model.weights.h5")
        with open(name, "w") as file:
            file.write("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert os.listdir(target.parent) == ["model.weights.h5"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "model.keras"
    target.write_text("old")

    def write_half():
        with new_file(target) as name:
            with open(name, "w") as file:
                file.write("half")
            raise KeyError

    with pytest.raises(KeyError):
        write_half()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["model.keras"]


def test_files_of_one_prefix_appear_with_the_index_last(tmp_path, monkeypatch):
    order = []
    replace = type(tmp_path).replace
    monkeypatch.setattr(
        type(tmp_path), "replace", lambda s, t: (order.append(t.name), replace(s, t))[1]
    )
    with new_prefix(tmp_path / "ckpt", ".index") as prefix:
        for ending in (".index", ".data-00000-of-00001"):
            with open(prefix + ending, "w") as file:
                file.write(ending)
    assert order == ["ckpt.data-00000-of-00001", "ckpt.index"]
    assert sorted(os.listdir(tmp_path)) == sorted(order)


def write_directory(name, text):
    os.makedirs(os.path.join(name, "variables"))
    for file in ("saved_model.pb", os.path.join("variables", "data")):
        with open(os.path.join(name, file), "w") as opened:
            opened.write(text)


def test_a_directory_is_replaced_entry_by_entry_and_other_files_stay(tmp_path):
    target = tmp_path / "served"
    for text in ("first", "second"):
        with new_directory(target, "saved_model.pb") as name:
            write_directory(name, text)
        (target / "mine.txt").write_text("mine")
    assert (target / "saved_model.pb").read_text() == "second"
    assert (target / "variables" / "data").read_text() == "second"
    assert sorted(os.listdir(target)) == ["mine.txt", "saved_model.pb", "variables"]


def test_an_error_while_writing_a_directory_leaves_the_old_one(tmp_path):
    target = tmp_path / "served"
    with new_directory(target, "saved_model.pb") as name:
        write_directory(name, "old")

    def write_half():
        with new_directory(target, "saved_model.pb") as name:
            write_directory(name, "half")
            raise KeyError

    with pytest.raises(KeyError):
        write_half()
    assert (target / "variables" / "data").read_text() == "old"
    assert sorted(os.listdir(target)) == ["saved_model.pb", "variables"]


def test_an_error_while_exchanging_entries_puts_the_old_ones_back(tmp_path, monkeypatch):
    target = tmp_path / "served"
    with new_directory(target, "saved_model.pb") as name:
        write_directory(name, "old")
    rename = type(target).rename

    def fails_at_the_last(self, to):
        if "replaced" not in str(self) and to == target / "saved_model.pb":
            raise OSError(5, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(type(target), "rename", fails_at_the_last)
    with (
        pytest.raises(SavingError, match="Input/output error"),
        new_directory(target, "saved_model.pb") as name,
    ):
        write_directory(name, "new")
    monkeypatch.undo()
    assert not (target / "saved_model.pb").exists() or (
        (target / "saved_model.pb").read_text() == (target / "variables" / "data").read_text()
    )


def test_paths_of_other_file_systems_are_told_apart():
    assert is_remote("gs://bucket/model.keras")
    assert not is_remote("/tmp/model.keras")
