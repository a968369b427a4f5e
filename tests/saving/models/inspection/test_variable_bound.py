from __future__ import annotations

import keras
import pytest

from opensmp.errors import SavingError
from opensmp.saving.models.inspection.inspection import Sizes
from opensmp.saving.models.inspection.variable_bound import variables_bounded


def dense(units):
    with variables_bounded(Sizes(largest=12, total=15), "a.keras", "load"):
        return keras.Sequential([keras.Input((4,)), keras.layers.Dense(units)])


def test_what_fits_the_file_is_made():
    assert dense(3).count_params() == 15


def test_variables_that_no_file_has_may_be_larger_than_its_own():
    assert dense(100_000).count_params() == 500_000


def test_one_that_is_far_larger_is_not_made_and_the_error_names_both_sizes():
    with pytest.raises(
        SavingError,
        match=r"a.keras .*shape \(4, 2000000000\), 8,000,000,000 elements.* 15 elements in all, the"
        " largest of 12",
    ):
        dense(2 * 10**9)


def bounded(work):
    with variables_bounded(Sizes(12, 15), "a.keras", "load"):
        work()


def test_many_small_ones_are_counted_together():
    def make_many():
        for _ in range(20):
            keras.layers.Dense(1000).build((1, 1000))

    with pytest.raises(SavingError, match="asks for a variable"):
        bounded(make_many)


def test_the_bound_stands_when_keras_makes_another_error_of_it():
    def make():
        try:
            keras.layers.Dense(10**9).build((1, 10))
        except SavingError as error:
            raise TypeError("could not be deserialized") from error

    with pytest.raises(SavingError, match="asks for a variable"):
        bounded(make)


def test_afterwards_there_is_no_bound():
    dense(1)
    layer = keras.layers.Dense(10)
    layer.build((1, 900_000))
    assert layer.count_params() == 9_000_010
