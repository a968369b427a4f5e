from __future__ import annotations

import ast
from pathlib import Path

import longest
import turns

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


def test_each_long_test_has_its_turn_within_some_weeks(monkeypatch):
    """Also the part of it that takes turns itself, of two, three or seven."""
    tests = longest.long_tests()
    for of in (1, 2, 3, 7):
        seen = set()
        for number in range(0, 130 * of, of):
            monkeypatch.setattr(turns, "day", lambda number=number: number)
            seen |= {test for test in tests if longest.has_turn(test)}
        assert seen == tests


def test_a_day_has_a_third_of_them(monkeypatch):
    tests = longest.long_tests()
    shares = []
    for number in range(30):
        monkeypatch.setattr(turns, "day", lambda number=number: number)
        shares.append(sum(longest.has_turn(test) for test in tests) / len(tests))
    assert max(shares) < 0.45
    assert longest.has_turn("tests/a.py::b[c]") == longest.has_turn("tests/a.py::b@group")
