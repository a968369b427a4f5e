"""Divisors of an integer, for error messages that suggest valid values."""

from __future__ import annotations

from math import isqrt


def divisors(number: int) -> list[int]:
    """Returns all divisors of `number` (an integer >= 1), ascending, in O(sqrt(number))."""
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return small + [number // n for n in reversed(small) if n * n != number]


def nearest_divisors(number: int, wanted: int, most: int) -> list[int]:
    """Returns the `most` divisors of `number` (>= 1) closest to `wanted`, ascending."""
    return sorted(sorted(divisors(number), key=lambda n: (abs(n - wanted), n))[:most])
