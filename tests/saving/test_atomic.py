from __future__ import annotations

import os

import pytest
import tensorflow as tf

from opensmp.errors import SavingError
from opensmp.saving.atomic import is_remote, new_directory, new_file, new_files, new_prefix


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


def test_files_of_others_in_directories_of_the_same_name_stay(tmp_path):
    target = tmp_path / "project"
    (target / "variables").mkdir(parents=True)
    (target / "variables" / "notes.txt").write_text("mine")
    with new_directory(target, "saved_model.pb") as name:
        write_directory(name, "new")
    assert (target / "variables" / "notes.txt").read_text() == "mine"
    assert (target / "variables" / "data").read_text() == "new"
    assert sorted(os.listdir(target)) == ["saved_model.pb", "variables"]


@pytest.mark.parametrize("swapped", ["variables", "saved_model.pb"])
def test_a_file_where_a_directory_belongs_is_left_and_the_reverse(tmp_path, swapped):
    target = tmp_path / "project"
    target.mkdir()
    if swapped == "variables":
        (target / "variables").write_text("mine")
    else:
        (target / "saved_model.pb").mkdir()
    with (
        pytest.raises(SavingError, match=f"other things of the names .*{swapped}. Give another"),
        new_directory(target, "saved_model.pb") as name,
    ):
        write_directory(name, "new")
    assert os.listdir(target) == [swapped]


def test_a_link_to_a_directory_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "served").symlink_to(tmp_path / "disk")
    with new_directory(tmp_path / "served", "saved_model.pb") as name:
        write_directory(name, "new")
    assert (tmp_path / "served").is_symlink()
    assert sorted(os.listdir(tmp_path / "disk")) == ["saved_model.pb", "variables"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_directories_above_go_after_an_error_if_they_were_made(tmp_path, error):
    (tmp_path / "there").mkdir()

    def fail(context):
        with context:
            raise error

    for context in (
        new_file(tmp_path / "there" / "a" / "b" / "m.keras"),
        new_directory(tmp_path / "there" / "a" / "b" / "served", "saved_model.pb"),
        new_prefix(tmp_path / "there" / "a" / "b" / "ckpt", ".index"),
        new_files(tmp_path / "there" / "a" / "b", "x.json"),
    ):
        with pytest.raises((KeyboardInterrupt, SavingError)):
            fail(context)
        assert os.listdir(tmp_path) == ["there"]
        assert os.listdir(tmp_path / "there") == []


def test_directories_of_a_prefix_that_were_left_behind_go(tmp_path):
    def fail():
        with new_prefix(tmp_path / "ckpt", ".index") as prefix:
            os.mkdir(prefix + "_temp")
            raise OSError(28, "No space left on device")

    with pytest.raises(SavingError, match=r"No space left on device\. .*MiB are free"):
        fail()
    assert os.listdir(tmp_path) == []


def test_several_files_get_their_names_with_the_entry_last(tmp_path):
    (tmp_path / "x.json").write_text("old")
    (tmp_path / "y.json").write_text("mine")
    with new_files(tmp_path, "x.json") as folder:
        for name in ("x.json", "x.weights.h5"):
            with open(os.path.join(folder, name), "w") as file:
                file.write("new")
        assert (tmp_path / "x.json").read_text() == "old"
    assert {name: (tmp_path / name).read_text() for name in os.listdir(tmp_path)} == {
        "x.json": "new",
        "x.weights.h5": "new",
        "y.json": "mine",
    }


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (
            RuntimeError(
                "Can't decrement id ref count (file write failed: errno = 28, error "
                "message = 'No space left on device', buf = 0x1)"
            ),
            "No space left on device",
        ),
        (
            tf.errors.ResourceExhaustedError(
                None, None, "{{function_node x}} a.tempstate1; No space left on device [Op:SaveV2]"
            ),
            "No space left on device",
        ),
    ],
)
def test_errors_of_all_libraries_that_write_say_the_same(tmp_path, error, reason):
    with pytest.raises(SavingError) as caught, new_file(tmp_path / "m.keras"):
        raise error
    assert f"could not be written: {reason}. What was there before" in str(caught.value)


def test_errors_that_are_none_of_writing_pass(tmp_path):
    with pytest.raises(RuntimeError, match="a bug"), new_file(tmp_path / "m.keras"):
        raise RuntimeError("a bug")


def test_paths_of_other_file_systems_are_told_apart():
    assert is_remote("gs://bucket/model.keras")
    assert not is_remote("/folder/model.keras")
