"""The tests that take long; the default run leaves them out. `scripts/long_tests.py` lists them."""

from __future__ import annotations

import functools
from pathlib import Path

from turns import has_days_turn

LIST = Path(__file__).parent / "long.txt"

DAYS = 3
"""Each long test has its turn on one day of so many."""


@functools.cache
def long_tests() -> frozenset[str]:
    """Ids of tests without parameters, such as `tests/cli/test_run.py::test_exit_code`."""
    return frozenset(LIST.read_text(encoding="utf-8").split())


def is_long(test: str) -> bool:
    """Whether a test is long.

    Args:
        test: Its id, with or without parameters.
    """
    return test.partition("[")[0] in long_tests()


def has_turn(test: str) -> bool:
    """Whether a long test is run today, all of its cases.

    Args:
        test: Its id, with or without parameters.
    """
    return has_days_turn(test.partition("[")[0].partition("@")[0], DAYS)
