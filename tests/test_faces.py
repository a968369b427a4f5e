from __future__ import annotations

import importlib
import pkgutil
import sys
import types

import pytest
from helpers import output_of

import opensmp

FACES = ["smp", "smdistributed.modelparallel.tensorflow"]


def public_names() -> list[str]:
    return list(opensmp.__all__)


@pytest.fixture(params=FACES)
def face(request: pytest.FixtureRequest) -> types.ModuleType:
    return importlib.import_module(request.param)


def test_every_public_name_is_the_same_object(face):
    assert public_names()
    for name in public_names():
        assert getattr(face, name) is getattr(opensmp, name), name


def test_names_added_later_are_there_as_well(face, monkeypatch):
    monkeypatch.setattr(opensmp, "a_later_name", object(), raising=False)
    assert face.a_later_name is opensmp.a_later_name


def test_star_import_gives_the_public_names(face):
    namespace: dict[str, object] = {}
    exec(f"from {face.__name__} import *", namespace)
    namespace.pop("__builtins__")
    assert sorted(namespace) == sorted(public_names())


def test_dir_shows_the_public_names(face):
    assert set(public_names()) <= set(dir(face))


def test_unknown_name_is_an_attribute_error_of_the_face(face):
    with pytest.raises(AttributeError, match=f"module '{face.__name__}' has no attribute 'nope'"):
        _ = face.nope


def test_submodules_are_not_imported_a_second_time():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("smp.config")
    assert "smp.config" not in sys.modules


def test_one_world_is_seen_through_all_faces():
    out = output_of(
        """
import smp as one
import smdistributed.modelparallel.tensorflow as other
import opensmp
one.init({"partitions": 2})
print(other.rank(), opensmp.size(), other.is_initialized())
other.shutdown()
print(opensmp.is_initialized())
"""
    )
    assert out.split("\n") == ["0 1 True", "False"]


def test_another_distribution_may_add_to_the_namespace(tmp_path):
    package = tmp_path / "smdistributed" / "dataparallel"
    package.mkdir(parents=True)
    (tmp_path / "smdistributed" / "__init__.py").touch()
    (package / "__init__.py").write_text("here = True\n")
    out = output_of(
        f"""
import sys
sys.path.append({str(tmp_path)!r})
import smdistributed.dataparallel
print(smdistributed.dataparallel.here)
"""
    )
    assert out == "True"


class TestLoading:
    """Names are imported at their first use."""

    def test_the_command_line_does_not_wait_for_tensorflow(self):
        imported = output_of(
            """
import sys
import opensmp.cli
print([name for name in ("tensorflow", "keras", "numpy") if name in sys.modules])
"""
        )
        assert imported == "[]"

    def test_the_first_name_brings_all(self):
        out = output_of(
            """
import sys
import opensmp as smp
print(smp.errors.StepError.__name__, "tensorflow" in sys.modules)
print(smp.step.__name__, "tensorflow" in sys.modules, set(smp.__all__) - vars(smp).keys())
"""
        )
        assert out.splitlines() == ["StepError False", "step True set()"]

    def test_all_names_that_are_imported_are_handed_out_and_no_others(self):
        imported = vars(importlib.import_module("opensmp.api.names")).keys()
        names = {name for name in imported if not name.startswith("_")}
        assert names - {"annotations", "require_tensorflow"} == set(opensmp.__all__)

    def test_type_checkers_are_told_the_same_names(self):
        assert importlib.import_module("opensmp.api.names").__all__ == opensmp.__all__

    def test_no_module_hides_a_name(self):
        """Python makes a module that is imported an attribute of its package."""
        modules = {module.name for module in pkgutil.iter_modules(opensmp.__path__)}
        assert not modules & set(opensmp.__all__)

    def test_unknown_names_are_attribute_errors(self):
        for name in ("nope", "_nope"):
            with pytest.raises(AttributeError, match=f"'opensmp' has no attribute '{name}'"):
                getattr(opensmp, name)
