from __future__ import annotations

import pytest

from opensmp.base.divisors import divisors, nearest_divisors


@pytest.mark.parametrize("number", [1, 2, 12, 16, 97, 360, 9999])
def test_divisors_are_all_that_divide(number):
    assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]


def test_divisors_of_a_large_number_come_at_once():
    assert divisors(10**12 - 1)[-2:] == [(10**12 - 1) // 3, 10**12 - 1]


def test_nearest_divisors_are_those_around():
    assert nearest_divisors(360, 7, 4) == [5, 6, 8, 9]
    assert nearest_divisors(8, 1000, 2) == [4, 8]
