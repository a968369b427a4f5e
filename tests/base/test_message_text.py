from __future__ import annotations

from typing import Any

import pytest

from opensmp.base.message_text import (
    counted,
    did_you_mean,
    nearest,
    numbered,
    plain,
    sentence,
    shown,
)


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 7, -7, 2.5, "a'b", b"ab", [], [1, "a"], (), (1,), (1, 2), {}, {1: [2]}),
        *({3}, frozenset({3}), {"a": {"b": (1, {2})}}, int, 10**60),
    ],
)
def test_short_value_is_shown_as_python_writes_it(value):
    assert shown(value) == repr(value)


def test_long_value_is_cut():
    assert shown("a" * 1_000_000, 10) == "'aaaaaa..."
    assert len(shown(["ab"] * 1_000_000)) == 80
    assert len(shown({i: i for i in range(1000)}, 40)) == 40


def test_number_of_thousands_of_digits_is_shown_by_its_size():
    assert shown(10**5000) == "1e5000"
    assert shown(-(10**5000)) == "-1e5000"


def test_value_inside_itself_is_shown():
    value: list[Any] = [1]
    value.append(value)
    assert shown(value).startswith("[1, [1, [1, ")
    wide: list[Any] = []
    for _ in range(60):  # 2 ** 60 items, if one goes through all
        wide = [wide, wide]
    assert len(shown(wide)) <= 80


def test_value_that_cannot_be_printed_is_shown_by_its_type():
    class Unprintable:
        def __repr__(self) -> str:
            raise RuntimeError

    assert shown([Unprintable()]) == "[<Unprintable>]"


def test_nearest_name():
    assert nearest("microbatch", ["partitions", "microbatches"]) == "microbatches"
    assert nearest("Partitions", ["partitions"]) == "partitions"
    assert nearest("Dense_1", ["Dense_2"]) == "Dense_2"
    assert nearest("xyzzy", ["partitions"]) is None
    assert nearest("a" * 1_000_000, ["a" * 999_999]) is None
    assert nearest(3, ["3"]) is None
    assert did_you_mean("a", ["a"], faults=["f"] * 1000) == ""


def test_names_are_plain_and_all_else_is_quoted():
    assert plain("OPENSMP_PLAN") == "OPENSMP_PLAN"
    assert plain("a b") == "'a b'"
    assert plain(3) == "3"


def test_of_many_faults_the_first_are_numbered():
    assert numbered(["a", "b"]) == ["  1. a", "  2. b"]
    assert numbered(["a"] * 70)[-2:] == ["  50. a", "  and 20 more."]


def test_a_noun_is_in_the_singular_after_one():
    assert counted(1, "microbatch") == "1 microbatch"
    assert [counted(n, "microbatch") for n in (0, 2, 12)] == [
        "0 microbatches",
        "2 microbatches",
        "12 microbatches",
    ]
    assert counted(3, "process") == "3 processes"
    assert counted(2, "piece") == "2 pieces"
    assert counted(2, "entry", "entries") == "2 entries"


def test_a_sentence_ends_once():
    assert sentence(["one", "two"]) == "one; two."
    assert sentence(["did you mean 'zb_v'?"]) == "did you mean 'zb_v'?"
    assert sentence(["one."]) == "one."
