from __future__ import annotations

import ast
from pathlib import Path

import longest

TESTS = Path(__file__).parent


def names_in(path):
    """Names of the tests of a file, those of classes as `Class::test`."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        inside = [node]
        if isinstance(node, ast.ClassDef):
            inside = node.body
        for each in inside:
            if isinstance(each, ast.FunctionDef):
                yield each.name if each is node else f"{node.name}::{each.name}"


def test_every_long_test_is_there():
    """After a renaming, rename it in tests/long.txt as well, or make the list again."""
    gone = []
    for test in longest.long_tests():
        file, _, name = test.partition("::")
        path = TESTS.parent / file
        if not path.exists() or name not in names_in(path):
            gone.append(test)
    assert gone == []


def test_the_list_is_in_order_and_names_each_test_once():
    lines = longest.LIST.read_text(encoding="utf-8").splitlines()
    assert lines == sorted(set(lines))


def test_cases_of_a_long_test_are_long():
    test = min(longest.long_tests())
    assert longest.is_long(test)
    assert longest.is_long(f"{test}[case-1]")
    assert not longest.is_long("tests/test_longest.py::test_cases_of_a_long_test_are_long")
