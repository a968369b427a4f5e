from __future__ import annotations

import sys

import keras
import pytest

from opensmp.base.message_text import shown
from opensmp.cli.models.target import load_target, parse_arguments
from opensmp.errors import PlanError


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    """A directory of modules, which is the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "target_models.py").write_text(
        "class Zoo:\n    def build():\n        return 3\ndef build():\n    return 4\n"
    )
    (tmp_path / "target_broken.py").write_text("1 / 0\n")
    (tmp_path / "target_needy.py").write_text("import target_not_there\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "target_inner.py").write_text("def build():\n    return 5\n")
    yield
    for name in [name for name in sys.modules if name.startswith("target_")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("target_models:build", 4),
        ("target_models:Zoo.build", 3),
        ("target_models.py:build", 4),
        ("sub/target_inner.py:build", 5),
    ],
)
def test_target_is_found_by_module_or_file(target, expected):
    assert load_target(target)() == expected


def test_installed_package_is_found():
    assert load_target("keras.applications:ResNet50") is keras.applications.ResNet50


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("models", ["'models' names no model factory", "module:factory"]),
        (":build", ["names no model factory"]),
        ("target_models:", ["names no model factory"]),
        ("target_absent:build", ["There is no module 'target_absent'", "path of its file"]),
        ("target_absent.py:build", ["There is no file 'target_absent.py'"]),
        ("target_models:biuld", ["has no attribute 'biuld'", "did you mean 'build'?"]),
        ("target_models:xyzzy", ["has no attribute 'xyzzy'", "there are: Zoo, build."]),
        ("target_models:Zoo.xyzzy", ["has no attribute 'Zoo.xyzzy'"]),
        ("target_broken:build", ["failed while it was imported", "ZeroDivisionError"]),
        ("target_needy:build", ["needs the module 'target_not_there', which is not installed"]),
        ("target_models.inner:build", ["There is no module 'target_models.inner'"]),
    ],
)
def test_target_that_is_not_there_gets_a_message_that_says(target, parts):
    with pytest.raises(PlanError) as caught:
        load_target(target)
    for part in parts:
        assert part in str(caught.value)


def test_arguments_are_json_or_text():
    assert parse_arguments(["weights=null", "shape=[64, 3]", "name=a=b", "classes=10", "x="]) == {
        "weights": None,
        "shape": [64, 3],
        "name": "a=b",
        "classes": 10,
        "x": "",
    }


def test_arguments_without_a_name_are_refused_all_at_once():
    with pytest.raises(PlanError, match=r"expected name=value.*received 'weights', '=3', '1x=2'"):
        parse_arguments(["weights", "=3", "1x=2", "classes=10"])


@pytest.mark.parametrize(
    ("target", "part"),
    [
        ("a" * 5000 + ".py:build", "There is no file"),
        ("a\0b.py:build", "There is no file"),
        (".target_models:build", "is no name of a module"),
        ("target models:build", "is no name of a module"),
        ("..:build", "is no name of a module"),
        ("target_models:", "names no model factory"),
        ("target_models:" + "a" * 100_000, "has no attribute"),
        ("a" * 100_000, "names no model factory"),
    ],
    ids=shown,
)
def test_target_that_no_module_can_have_is_refused(target, part):
    with pytest.raises(PlanError) as caught:
        load_target(target)
    assert part in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("import sys\nsys.exit(3)\n", "failed while it was imported: SystemExit: 3"),
        ("raise ModuleNotFoundError('none')\n", "There is no module"),
        ("def __getattr__(name):\n    raise OSError('gone')\n", "looked up: OSError: gone"),
    ],
)
def test_module_that_does_what_it_likes_is_named(text, part, tmp_path):
    (tmp_path / "target_odd.py").write_text(text)
    with pytest.raises(PlanError) as caught:
        load_target("target_odd:build")
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ("9" * 5000, "too many digits"),
        ("1e999", "1e999 is too large"),
        ('{"a": 1, "a": 2}', "'a' comes twice"),
    ],
    ids=shown,
)
def test_argument_that_is_json_but_cannot_be_used_is_refused(value, part):
    with pytest.raises(PlanError, match="whose value cannot be used") as caught:
        parse_arguments([f"x={value}", "y=1"])
    assert part in str(caught.value)


def test_argument_that_is_given_twice_is_refused():
    with pytest.raises(PlanError, match="'x' a second time"):
        parse_arguments(["x=1", "x=2"])


def test_argument_that_is_no_number_of_json_is_a_text():
    assert parse_arguments(["a=NaN", "b=Infinity"]) == {"a": "NaN", "b": "Infinity"}
