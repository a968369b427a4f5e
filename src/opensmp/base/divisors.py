"""The divisors of a number, for messages about what does not divide it."""

from __future__ import annotations

from math import isqrt


def divisors(number: int) -> list[int]:
    """All divisors, ascending; takes as many steps as the square root has.

    Args:
        number: An integer >= 1.

    Example:
        >>> divisors(12)
        [1, 2, 3, 4, 6, 12]
    """
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return small + [number // n for n in reversed(small) if n * n != number]


def nearest_divisors(number: int, wanted: int, most: int) -> list[int]:
    """The divisors nearest to what was wanted, ascending.

    Args:
        number: An integer >= 1.
        wanted: What does not divide it.
        most: How many.

    Example:
        >>> nearest_divisors(360, 7, 4)
        [5, 6, 8, 9]
    """
    return sorted(sorted(divisors(number), key=lambda n: (abs(n - wanted), n))[:most])
