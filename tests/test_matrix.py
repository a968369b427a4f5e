"""`scripts/matrix.sh`: which versions are run together, and what the table says."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERAS = ["3.8.0", "3.9.0", "3.9.2", "3.10.0", "3.12.0", "3.12.1", "3.14.0", "3.15.1"]
RELEASES = {
    "tensorflow-cpu": ["2.18.1", "2.19.0", "2.19.1", "2.20.0", "2.20.1", "2.21.0"],
    "keras": KERAS,
}


@pytest.fixture(scope="module")
def matrix() -> Any:
    path = ROOT / "scripts" / "matrix.py"
    sys.path.insert(0, str(path.parent))
    try:
        spec = importlib.util.spec_from_file_location("matrix", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["matrix"] = module  # where its dataclasses look
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def index(*pythons: str) -> Any:
    """A package index that has a few releases of TensorFlow and Keras, for all Pythons."""

    def versions(python: str, name: str) -> list[str]:
        assert python in pythons
        return RELEASES.get(name, ["1.0", "13.0.0", "99.0"])

    return SimpleNamespace(
        interpreters={python: f"python{python}" for python in pythons},
        versions=versions,
        needed=lambda python, tensorflow, name: {"2.21.0": "3.12.0"}.get(tensorflow, "3.10.0"),
    )


def pairs(rows: Any) -> dict[str, tuple[str, str, str]]:
    return {row.name: (row.python, row.pins["tensorflow-cpu"], row.pins["keras"]) for row in rows}


def test_rows_have_the_oldest_the_newest_and_pairs_between(matrix):
    assert pairs(matrix.planned(index("3.10", "3.11", "3.12", "3.13"))) == {
        "oldest": ("3.10", "2.19.0", "3.9.0"),
        "old-tensorflow": ("3.11", "2.19.0", "3.15.1"),
        "middle": ("3.12", "2.20.1", "3.14.0"),
        "old-keras": ("3.11", "2.21.0", "3.12.0"),
        "newest": ("3.13", "2.21.0", "3.15.1"),
    }


def test_one_python_is_enough(matrix):
    assert {row.python for row in matrix.planned(index("3.12"))} == {"3.12"}


def test_a_python_is_needed(matrix):
    with pytest.raises(SystemExit, match="none of the Pythons"):
        matrix.planned(index())


def test_the_quick_row_has_the_oldest_of_all_that_the_package_depends_on(matrix):
    (row,) = matrix.planned(index("3.11"), quick=True)
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    needed = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert needed is not None
    names = re.findall(r'"([\w-]+)>=', needed[1])
    assert set(row.pins) == {*names, "tensorflow-cpu"}


@pytest.mark.parametrize(
    ("count", "status", "expected"),
    [
        ("tests='9' failures='0' errors='0' skipped='2'", 0, (True, "7 passed, 2 skipped")),
        ("tests='9' failures='1' errors='1' skipped='0'", 1, (False, "7 passed, 2 failed")),
        ("tests='0' failures='0' errors='0' skipped='0'", 0, (False, "0 passed")),
        ("tests='9' failures='0' errors='0' skipped='0'", 2, (False, "9 passed, stopped early")),
    ],
)
def test_a_report_of_pytest_is_counted(matrix, count, status, expected):
    report = ElementTree.fromstring(f"<testsuites><testsuite {count}/></testsuites>")
    assert matrix.counted(report, status) == expected


def result(matrix: Any, name: str, keras: str, **checks: Any) -> dict[str, Any]:
    versions = {**dict.fromkeys(matrix.SHOWN, "1.0"), "keras": keras}
    return {"name": name, "date": "2026-01-01", "versions": versions, **checks}


def test_results_are_kept_in_the_order_of_the_rows(matrix, tmp_path):
    path = tmp_path / "versions.jsonl"
    for name in ("newest", "gone", "oldest"):
        matrix.record(path, result(matrix, name, "3.9"), ["oldest", "gone", "newest"])
    matrix.record(path, result(matrix, "oldest", "3.9"), ["oldest", "newest"])
    assert [each["name"] for each in matrix.load(path)] == ["oldest", "newest"]


def test_what_was_not_run_again_is_kept_for_the_same_versions_only(matrix, tmp_path):
    path, passed = tmp_path / "versions.jsonl", {"good": True, "text": "3 passed"}
    matrix.record(path, result(matrix, "newest", "3.9", parity=passed), ["newest"])
    matrix.record(path, result(matrix, "newest", "3.9", smoke=passed), ["newest"])
    assert matrix.load(path)[0]["parity"] == passed
    matrix.record(path, result(matrix, "newest", "3.10", smoke=passed), ["newest"])
    assert "parity" not in matrix.load(path)[0]


def test_the_table_shows_what_failed_and_what_was_not_run(matrix):
    failed = {"good": False, "text": "3 passed, 1 failed"}
    lines = matrix.table([result(matrix, "oldest", "3.9.0", smoke=failed)]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "| 3.9.0 |" in lines[2]
    assert lines[2].endswith("| **3 passed, 1 failed** | not run | not run | 2026-01-01 |")


def test_the_page_has_the_table_of_the_results_that_are_kept(matrix):
    results = matrix.load(ROOT / "docs" / "versions.jsonl")
    assert matrix.table(results) in (ROOT / "docs" / "versions.md").read_text("utf-8")
    checks = ("smoke", "canaries", "parity")
    assert all(each[check]["good"] for each in results for check in checks if check in each)
    assert {"oldest", "newest"} <= {each["name"] for each in results}
