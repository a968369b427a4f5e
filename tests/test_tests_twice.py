"""What `.ci/run` does about tests that fail once: scripts/tests_twice.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

import failures

ROOT = Path(__file__).parents[1]

CONFTEST = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from failures import keep_failures as pytest_configure
import pytest

@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
"""
# Each test fails as often as its number says, counted in a file.
TESTS = """
import pathlib
import pytest

@pytest.mark.parametrize(("name", "times"), list(enumerate(TIMES)), ids=lambda n: f"a b-[{n}]")
def test_it(name, times):
    file = pathlib.Path(__file__).with_name(f"count_{name}")
    count = len(file.read_text()) if file.exists() else 0
    file.write_text("x" * (count + 1))
    assert count >= times

class TestClass:
    def test_well(self):
        pass
"""


@pytest.fixture(scope="module")
def twice():
    spec = importlib.util.spec_from_file_location("twice", ROOT / "scripts" / "tests_twice.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(twice, tmp_path, monkeypatch):
    """`run(0, 1)`: of tests that fail never and once, the exit code and what has passed alone."""

    def run(*times, text=TESTS):
        (tmp_path / "conftest.py").write_text(CONFTEST)
        (tmp_path / "test_some.py").write_text(f"TIMES = {times}\n{text}")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        command = [sys.executable, "-m", "pytest", "-p", "xdist.plugin", "-q"]
        command += ["-n", "1", "--dist", "loadgroup"]
        code = twice.run_twice(command, tmp_path / "out" / "alone.txt")
        starts = [len(file.read_text()) for file in sorted(tmp_path.glob("count_*"))]
        return code, (tmp_path / "out" / "alone.txt").read_text().splitlines(), starts

    return run


def test_both_mean_the_same_variable(twice):
    assert twice.VARIABLE == failures.VARIABLE


def test_if_all_pass_nothing_is_run_twice(run):
    assert run(0, 0) == (0, [], [1, 1])


def test_up_to_three_that_fail_once_are_named_and_pass(run):
    names = [f"test_some.py::test_it[a b-[{number}]-a b-[1]]" for number in (0, 2, 3)]
    assert run(1, 0, 1, 1) == (0, names, [2, 1, 2, 2])


def test_a_test_that_fails_twice_fails_the_run(run):
    assert run(1, 2) == (1, [], [2, 2])


def test_four_that_fail_are_not_run_again(run):
    assert run(1, 1, 1, 1) == (1, [], [1, 1, 1, 1])


def test_what_cannot_be_collected_fails_the_run(run):
    code, passed_alone, _ = run(text="1 / 0\n")
    assert code != 0
    assert passed_alone == []


def test_a_test_that_ends_its_process_is_run_once_more(run):
    text = TESTS.replace("assert count >= times", "count >= times or __import__('os')._exit(1)")
    code, passed_alone, _ = run(0, 1, text=text)  # pytest-xdist may start it again, too
    assert code == 0
    assert passed_alone == ["test_some.py::test_it[a b-[1]-a b-[1]]"]


def test_wrong_arguments_are_not_tried_again(twice, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "pytest", "--no-such-option"]
    assert twice.run_twice(command, tmp_path / "alone.txt") == 4


@pytest.mark.parametrize(
    ("reported", "test"),
    [
        ("tests/a.py::test_b", "tests/a.py::test_b"),
        ("tests/a.py::test_b@tests/a.py", "tests/a.py::test_b"),
        ("tests/a.py::TestC::test_b[x@y]@tests/a.py", "tests/a.py::TestC::test_b[x@y]"),
        ("tests/a.py::test_b[c-P2]@tests/a.pytest_b[c", "tests/a.py::test_b[c-P2]"),
    ],
)
def test_names_come_without_groups(reported, test):
    assert failures._without_group(reported) == test
