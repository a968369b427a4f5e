"""The causes of differences, shown: take the cause away and the difference is gone."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import numpy as np
import pytest
from parity.bounds import REASSOCIATED, REASSOCIATED_DOUBLE, SEVERAL_USES, Bound
from parity.case import Case
from parity.cases import CASES
from parity.layout import with_policy
from parity.records import compare, worst
from parity.runs import run_plain, run_split
from turns import in_turn

from opensmp.base import versions


def having(*bounds: Bound) -> list[Any]:
    return in_turn([case for case in CASES if case.bound in bounds], 3)


@pytest.mark.parametrize("case", having(REASSOCIATED, REASSOCIATED_DOUBLE))
def test_bits_are_equal_where_tensorflow_reorders_nothing(case: Case) -> None:
    layout = case.layouts[-1]
    plain = run_plain(case, layout.microbatches, exact=True)
    differences = compare(plain, run_split(case, layout, exact=True))
    assert not differences, "\n".join(map(str, differences[:10]))


@pytest.mark.parametrize("case", having(SEVERAL_USES))
def test_sums_in_another_order_differ_by_rounding_only(case: Case) -> None:
    def batch(random: Any, size: int) -> tuple[Any, ...]:
        return tuple(np.asarray(a, "float64") for a in case.batch(random, size))

    double = dataclasses.replace(
        case, parts=lambda make: with_policy("float64", case.parts, make), batch=batch
    )
    if case.name == "add_loss, regularizers" and versions.release(keras.__version__) < (3, 14):
        pytest.skip("plain Keras takes no float64 in regularizers.L1 before 3.14")
    for layout in case.layouts:
        plain = run_plain(double, layout.microbatches)
        assert worst(compare(plain, run_split(double, layout))) <= 1e-12
